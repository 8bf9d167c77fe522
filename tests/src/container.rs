//! Programs that runc starts, with the rights of a pod: as a node's container runtime would.

use std::{
    env, fs,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{lab::Lab, process::Process, rights::Rights, seccomp};

/// A program and what it sees.
#[derive(Clone, Debug)]
pub struct Container {
    rights: Rights,
    root: Root,
    /// Mounted where it is.
    files: Vec<PathBuf>,
    /// Files of the container, and what they are on this machine.
    instead: Vec<(PathBuf, PathBuf)>,
    hidden: Option<PathBuf>,
    volumes: Option<PathBuf>,
    network: Network,
}

/// What a container's root folder is.
#[derive(Clone, Debug)]
enum Root {
    /// Empty but for the program.
    Program(PathBuf),
    /// An image, unpacked, and the program in it.
    Image(PathBuf, String),
}

/// The network that a container is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Network {
    /// One of its own, as every pod.
    Own,
    /// The machine's, where the lab's generators and API servers listen on loopback.
    Machine,
}

/// What containers may not look at, and what they may not change, in containerd and Docker.
const MASKED: [&str; 8] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

impl Container {
    /// A program of this workspace in an otherwise empty root.
    #[must_use]
    pub fn of_program(program: &Path, rights: Rights) -> Self {
        Self::new(Root::Program(program.to_owned()), rights)
    }

    /// The entry point of an image that was unpacked to a folder.
    #[must_use]
    pub fn of_image(root: &Path, entry_point: &str, rights: Rights) -> Self {
        Self::new(Root::Image(root.to_owned(), entry_point.to_owned()), rights)
    }

    fn new(root: Root, rights: Rights) -> Self {
        Self {
            rights,
            root,
            files: Vec::new(),
            instead: Vec::new(),
            hidden: None,
            volumes: None,
            network: Network::Own,
        }
    }

    /// It sees this file or folder of the machine at the same path.
    #[must_use]
    pub fn file(mut self, path: &Path) -> Self {
        self.files.push(path.to_owned());
        self
    }

    /// It sees this file of the machine at another path.
    #[must_use]
    pub fn file_at(mut self, path: &str, file: &Path) -> Self {
        self.instead.push((path.into(), file.to_owned()));
        self
    }

    /// What it writes to its volumes is kept in this folder, one of a number for each, and found there.
    #[must_use]
    pub fn volumes(mut self, folder: &Path) -> Self {
        self.volumes = Some(folder.to_owned());
        self
    }

    /// It finds a folder empty.
    #[must_use]
    pub fn hide(mut self, folder: Option<&Path>) -> Self {
        self.hidden = folder.map(Path::to_owned);
        self
    }

    /// It is in the machine's network.
    #[must_use]
    pub fn in_the_machine_s_network(mut self) -> Self {
        self.network = Network::Machine;
        self
    }

    /// Starts it; signals go through to it. Its folders are the lab's, and so is its end.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start<S: AsRef<str>>(
        &self,
        lab: &Lab,
        args: impl IntoIterator<Item = S>,
    ) -> Result<Process> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("{}-c{}", lab.name(), NEXT.fetch_add(1, Ordering::Relaxed));
        let bundle = lab.folder().join(&id);
        fs::create_dir_all(&bundle)?;
        let args: Vec<String> = args
            .into_iter()
            .map(|arg| arg.as_ref().to_owned())
            .collect();
        let config = self.config(lab, &bundle, &id, &args)?;
        fs::write(bundle.join("config.json"), config.to_string())?;
        let path = env::var_os("PATH").unwrap_or_default();
        ensure!(
            env::split_paths(&path).any(|folder| folder.join("runc").is_file()),
            "`runc` is not installed (cargo xtask setup)"
        );
        let state = lab.folder().join("runc");
        let words = [
            "--root".as_ref(),
            state.as_os_str(),
            "run".as_ref(),
            "--bundle".as_ref(),
            bundle.as_os_str(),
            id.as_ref(),
        ];
        lab.host().exec(Path::new("runc"), words)
    }

    /// The runtime configuration (`config.md` of the OCI runtime specification).
    fn config(&self, lab: &Lab, bundle: &Path, id: &str, args: &[String]) -> Result<Value> {
        let rights = &self.rights;
        let (user, group) = rights.user;
        // As all runtimes do: of another user than root the set is empty, whatever was added.
        let effective = match user {
            0 => rights.capabilities.clone(),
            _ => Default::default(),
        };
        let mut mounts = vec![
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount(
                "/dev",
                "tmpfs",
                "tmpfs",
                &["nosuid", "mode=755", "size=65536k"],
            ),
            mount(
                "/sys",
                "sysfs",
                "sysfs",
                &["nosuid", "noexec", "nodev", "ro"],
            ),
        ];
        for (node_s, at, read_only) in &rights.node_folders {
            mounts.push(bind(node_s, at, *read_only));
        }
        for (number, at) in rights.own_folders.iter().enumerate() {
            let volumes = self.volumes.as_deref().unwrap_or(bundle);
            let volume = volumes.join(number.to_string());
            fs::create_dir_all(&volume)?;
            if let Some(group) = rights.volumes_group {
                chown(&volume, None, Some(group))?;
                fs::set_permissions(&volume, fs::Permissions::from_mode(0o2770))?;
            }
            mounts.push(bind(&volume, at, false));
        }
        let (root, program, libraries) = self.root(bundle)?;
        let same = libraries.iter().chain(&self.files);
        mounts.extend(same.map(|path| bind(path, path, true)));
        let instead = self.instead.iter();
        mounts.extend(instead.map(|(at, file)| bind(file, at, true)));
        if let Root::Program(file) = &self.root {
            mounts.push(bind(file, Path::new(&program), true));
        }
        if let Some(folder) = &self.hidden {
            mounts.push(mount(
                &folder.display().to_string(),
                "tmpfs",
                "tmpfs",
                &["ro"],
            ));
        }
        let mut namespaces = vec!["mount", "ipc", "uts"];
        if !rights.host_pid {
            namespaces.push("pid");
        }
        if self.network == Network::Own {
            namespaces.push("network");
        }
        let namespaces = namespaces.iter().map(|kind| json!({"type": kind}));
        let words: Vec<&str> = [program.as_str()]
            .into_iter()
            .chain(args.iter().map(String::as_str))
            .collect();
        let mut linux = json!({
            "namespaces": namespaces.collect::<Vec<_>>(),
            // Below the lab's, so that what is in it ends with the lab.
            "cgroupsPath": format!("/{}/{id}", lab.name()),
            "resources": {"memory": {"limit": rights.memory}},
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        });
        if let Some(capabilities) = &rights.filter {
            linux["seccomp"] = seccomp::filter(capabilities);
        }
        Ok(json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {
                    "uid": user,
                    "gid": group,
                    "additionalGids": rights.volumes_group.into_iter().collect::<Vec<_>>(),
                },
                "args": words,
                "env": ["PATH=/usr/bin"],
                "cwd": "/",
                "capabilities": {
                    "bounding": rights.capabilities,
                    "effective": effective,
                    "permitted": effective,
                },
                "noNewPrivileges": rights.no_new_privileges,
            },
            "root": {"path": root, "readonly": rights.read_only_root},
            "mounts": mounts,
            "linux": linux,
        }))
    }

    /// The root folder, the program in it, and the machine's folders that the program needs: none, if it is static.
    fn root(&self, bundle: &Path) -> Result<(PathBuf, String, Vec<PathBuf>)> {
        let (root, program, file) = match &self.root {
            Root::Image(root, program) => {
                let file = root.join(program.trim_start_matches('/'));
                (root.clone(), program.clone(), file)
            }
            Root::Program(file) => {
                let root = bundle.join("root");
                fs::create_dir_all(&root)?;
                let name = file.file_name().context("a program")?.to_string_lossy();
                (root, format!("/usr/bin/{name}"), file.clone())
            }
        };
        let mut libraries = Vec::new();
        if needs_libraries(&file)? {
            let folders = ["/lib", "/lib64", "/usr/lib"].map(PathBuf::from);
            libraries.extend(folders.into_iter().filter(|folder| folder.is_dir()));
        }
        Ok((root, program, libraries))
    }
}

/// Whether a program names a loader at its start, as a debug build does and a program of a release image does not.
fn needs_libraries(program: &Path) -> Result<bool> {
    use std::io::Read as _;
    let mut head = Vec::new();
    let file = fs::File::open(program).with_context(|| program.display().to_string())?;
    file.take(4096).read_to_end(&mut head)?;
    Ok(head.windows(5).any(|part| part == b"/ld-l"))
}

fn mount(at: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({"destination": at, "type": kind, "source": source, "options": options})
}

fn bind(source: &Path, at: &Path, read_only: bool) -> Value {
    let access = if read_only { "ro" } else { "rw" };
    json!({"destination": at, "type": "none", "source": source, "options": ["rbind", access]})
}
