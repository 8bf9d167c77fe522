//! TLS whose keys and certificates are files.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};

/// How often the files of a server are looked at, at most: with each connection that comes after this time.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file has not what it should have.
    #[error("{}: {problem}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong. A key is not shown.
        problem: String,
    },
    /// Certificate and key, or the authorities, do not make a configuration.
    #[error("certificate {}: {problem}", path.display())]
    Unusable {
        /// The certificate's file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
    /// Neither a file nor the system names an authority.
    #[error("the system has no certificate authorities: give --ca")]
    NoAuthorities,
}

/// What a client needs.
#[derive(Clone, Debug, Default)]
pub struct ClientFiles {
    /// The authorities that a server's certificate must come from; without, those of the system.
    pub ca: Option<PathBuf>,
    /// Certificate and key to show.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// What a server needs.
#[derive(Clone, Debug)]
pub struct ServerFiles {
    /// Its certificate, followed by those between it and the authority.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authorities that a client's certificate must come from; without, none is asked for.
    pub client_ca: Option<PathBuf>,
}

/// A server's configuration, kept as its files are.
#[derive(Debug)]
pub struct ServerTls {
    files: ServerFiles,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    bytes: Vec<Vec<u8>>,
    config: Arc<ServerConfig>,
    looked: Instant,
}

impl ClientFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// If one is missing or not what it should be.
    pub fn config(&self) -> Result<ClientConfig, TlsError> {
        let mut roots = RootCertStore::empty();
        match &self.ca {
            Some(path) => add_authorities(&mut roots, path, &read(path)?)?,
            None => {
                let system = rustls_native_certs::load_native_certs();
                roots.add_parsable_certificates(system.certs);
                if roots.is_empty() {
                    return Err(TlsError::NoAuthorities);
                }
            }
        }
        let path = self.ca.clone().unwrap_or_default();
        let builder = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(unusable(&path))?
            .with_root_certificates(roots);
        match &self.identity {
            None => Ok(builder.with_no_client_auth()),
            Some((cert, key)) => builder
                .with_client_auth_cert(
                    certificates(cert, &read(cert)?)?,
                    private_key(key, &read(key)?)?,
                )
                .map_err(unusable(cert)),
        }
    }
}

impl ServerFiles {
    fn read(&self) -> Result<Vec<Vec<u8>>, TlsError> {
        [Some(&self.cert), Some(&self.key), self.client_ca.as_ref()]
            .into_iter()
            .flatten()
            .map(|path| read(path))
            .collect()
    }

    fn config(&self, bytes: &[Vec<u8>]) -> Result<Arc<ServerConfig>, TlsError> {
        let [cert, key, client_ca @ ..] = bytes else {
            return Err(TlsError::NoAuthorities);
        };
        let builder = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .map_err(unusable(&self.cert))?;
        let builder = match (&self.client_ca, client_ca) {
            (Some(path), [bytes, ..]) => {
                let mut roots = RootCertStore::empty();
                add_authorities(&mut roots, path, bytes)?;
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider())
                        .build()
                        .map_err(unusable(path))?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let certificates = certificates(&self.cert, cert)?;
        let key = private_key(&self.key, key)?;
        let config = builder
            .with_single_cert(certificates, key)
            .map_err(unusable(&self.cert))?;
        Ok(Arc::new(config))
    }
}

impl ServerTls {
    /// Reads the files.
    ///
    /// # Errors
    /// If one is missing or not what it should be.
    pub fn new(files: ServerFiles) -> Result<Self, TlsError> {
        let bytes = files.read()?;
        let config = files.config(&bytes)?;
        let state = Mutex::new(State {
            bytes,
            config,
            looked: Instant::now(),
        });
        Ok(Self { files, state })
    }

    /// The configuration for a connection that came now, as the files are. If they have become unusable, as between the
    /// replacement of a certificate and that of its key, it is the last usable one.
    pub fn config(&self) -> Arc<ServerConfig> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.looked.elapsed() >= LOOK_EVERY {
            state.looked = Instant::now();
            match self.files.read() {
                Ok(bytes) if bytes == state.bytes => {}
                Ok(bytes) => match self.files.config(&bytes) {
                    Ok(config) => {
                        tracing::info!(certificate = %self.files.cert.display(), "certificate replaced");
                        *state = State {
                            bytes,
                            config,
                            looked: Instant::now(),
                        };
                    }
                    Err(error) => {
                        tracing::warn!(%error, "the certificate that was replaced is not used");
                        // Said once for each content.
                        state.bytes = bytes;
                    }
                },
                Err(error) => tracing::debug!(%error, "certificate not read again"),
            }
        }
        Arc::clone(&state.config)
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}

fn certificates(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let malformed = |problem: String| TlsError::Malformed {
        path: path.to_owned(),
        problem,
    };
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| malformed(error.to_string()))?;
    if certificates.is_empty() {
        return Err(malformed("no certificate in it".to_owned()));
    }
    Ok(certificates)
}

fn private_key(path: &Path, pem: &[u8]) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(pem).or(Err(TlsError::Malformed {
        path: path.to_owned(),
        problem: "no private key in it".to_owned(),
    }))
}

fn add_authorities(roots: &mut RootCertStore, path: &Path, pem: &[u8]) -> Result<(), TlsError> {
    for certificate in certificates(path, pem)? {
        roots.add(certificate).map_err(unusable(path))?;
    }
    Ok(())
}

fn unusable<E: std::fmt::Display>(path: &Path) -> impl Fn(E) -> TlsError + use<'_, E> {
    move |error| TlsError::Unusable {
        path: path.to_owned(),
        problem: error.to_string(),
    }
}
