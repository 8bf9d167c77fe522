//! An OCI image layout: blobs by their digests, and documents that name them.

use std::{
    fmt, fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::{Arch, Program, layer::Layer};

const LAYOUT: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// The name of a blob: SHA-256 of its bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Digest(String);

impl Digest {
    pub(super) fn of(bytes: &[u8]) -> Self {
        Self(
            Sha256::digest(bytes)
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        )
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

/// An image of one architecture.
pub(super) struct Instance {
    pub(super) arch: &'static str,
    pub(super) config: Value,
    pub(super) layer: Layer,
}

impl Program {
    /// How a container of this image starts. The keys' order is serde_json's, which is that of their names.
    pub(super) fn config(&self, arch: Arch, layer: &Layer, epoch: u64) -> Result<Value> {
        let seconds = i64::try_from(epoch)?;
        let created = jiff::Timestamp::from_second(seconds)?.to_string();
        Ok(json!({
            "architecture": arch.name(),
            "os": "linux",
            "created": created,
            "config": {
                "User": self.user,
                "Env": ["PATH=/usr/bin"],
                "Entrypoint": [format!("/usr/bin/{}", self.name)],
                "ExposedPorts": {format!("{}/tcp", self.port): {}},
                "WorkingDir": "/",
                "Labels": {
                    "org.opencontainers.image.title": self.title,
                    "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
                    "org.opencontainers.image.licenses": env!("CARGO_PKG_LICENSE"),
                },
            },
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id.to_string()]},
            "history": [{"created": created, "created_by": "cargo xtask image"}],
        }))
    }
}

/// A folder that becomes an image layout.
pub(super) struct Layout {
    folder: PathBuf,
}

impl Layout {
    /// Starts anew: what an earlier image left in the folder goes.
    pub(super) fn create(folder: &Path) -> Result<Self> {
        let blobs = folder.join("blobs/sha256");
        if folder.join("oci-layout").is_file() {
            fs::remove_dir_all(folder).with_context(|| folder.display().to_string())?;
        }
        fs::create_dir_all(&blobs).with_context(|| blobs.display().to_string())?;
        Ok(Self {
            folder: folder.to_owned(),
        })
    }

    /// Writes everything: one image for each architecture, an index over them, and the layout's own index that gives this
    /// one a tag. Returns the digest of the index over the images, which is what a registry calls the image by.
    pub(super) fn finish(
        &mut self,
        instances: &[Instance],
        tag: &str,
        title: &str,
    ) -> Result<Digest> {
        let mut manifests = Vec::new();
        for instance in instances {
            let config = self.document(CONFIG, &instance.config)?;
            let layer = self.blob(LAYER, &instance.layer.packed)?;
            let manifest = json!({
                "schemaVersion": 2,
                "mediaType": MANIFEST,
                "config": config,
                "layers": [layer],
            });
            let mut descriptor = self.document(MANIFEST, &manifest)?;
            descriptor["platform"] = json!({"architecture": instance.arch, "os": "linux"});
            manifests.push(descriptor);
        }
        let index = json!({
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": manifests,
            "annotations": {"org.opencontainers.image.title": title},
        });
        let bytes = serde_json::to_vec(&index)?;
        let mut descriptor = self.blob(INDEX, &bytes)?;
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        let entry = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [descriptor]});
        self.file("oci-layout", LAYOUT.as_bytes())?;
        self.file("index.json", &serde_json::to_vec(&entry)?)?;
        Ok(Digest::of(&bytes))
    }

    fn document(&self, media_type: &str, document: &Value) -> Result<Value> {
        self.blob(media_type, &serde_json::to_vec(document)?)
    }

    /// Writes a blob and returns its descriptor.
    fn blob(&self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest = Digest::of(bytes);
        self.file(&format!("blobs/sha256/{}", digest.0), bytes)?;
        Ok(json!({
            "mediaType": media_type,
            "digest": digest.to_string(),
            "size": bytes.len(),
        }))
    }

    fn file(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, bytes).with_context(|| path.display().to_string())
    }
}
