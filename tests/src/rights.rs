//! What the manifests allow to a pod, read from `deploy/base`.

use std::{
    cell::RefCell,
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, Deployment},
        core::v1::{Container, PodSpec, PodTemplateSpec, ResourceRequirements},
    },
    apimachinery::pkg::api::resource::Quantity,
};
use serde::{Deserialize as _, de::DeserializeOwned};
use serde_yaml::Value;

thread_local! {
    static OF_AGENTS: RefCell<Option<Rights>> = const { RefCell::new(None) };
}

/// What a program may do in its container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rights {
    /// User and group.
    pub user: (u32, u32),
    /// The group that volumes belong to.
    pub volumes_group: Option<u32>,
    /// Capabilities as the kernel names them, such as `CAP_BPF`.
    pub capabilities: BTreeSet<String>,
    /// Whether nothing can be written but volumes.
    pub read_only_root: bool,
    /// Whether no program can get more rights than its parent.
    pub no_new_privileges: bool,
    /// If the runtime's default filter of system calls is on: the capabilities that it opens system calls for.
    pub filter: Option<BTreeSet<String>>,
    /// Whether it is in the node's pid namespace.
    pub host_pid: bool,
    /// The node's folders, and where they are mounted; read-only if `true`.
    pub node_folders: Vec<(PathBuf, PathBuf, bool)>,
    /// Where volumes of its own are mounted that it may write.
    pub own_folders: Vec<PathBuf>,
    /// The memory that is set aside for it, in bytes.
    pub memory_request: u64,
    /// The most memory that it may take, in bytes.
    pub memory: u64,
}

impl Rights {
    /// The agent's.
    ///
    /// # Errors
    /// If the manifest cannot be read.
    pub fn of_agent() -> Result<Self> {
        let daemon_set: DaemonSet = object("agent.yaml", "DaemonSet")?;
        Self::of(&daemon_set.spec.template)
    }

    /// The generator's.
    ///
    /// # Errors
    /// If the manifest cannot be read.
    pub fn of_generator() -> Result<Self> {
        let deployment: Deployment = object("generator.yaml", "Deployment")?;
        Self::of(&deployment.spec.template)
    }

    /// Without a capability.
    #[must_use]
    pub fn without(mut self, capability: &str) -> Self {
        self.capabilities.remove(capability);
        self.filtered_without(capability)
    }

    /// With a filter that knows nothing of a capability: not every runtime's default does.
    #[must_use]
    pub fn filtered_without(mut self, capability: &str) -> Self {
        if let Some(filter) = &mut self.filter {
            filter.remove(capability);
        }
        self
    }

    /// With a capability more.
    #[must_use]
    pub fn with(mut self, capability: &str) -> Self {
        self.capabilities.insert(capability.to_owned());
        if let Some(filter) = &mut self.filter {
            filter.insert(capability.to_owned());
        }
        self
    }

    /// Runs something in which agents that this thread starts have these rights, and are started as containers.
    pub fn for_agents<T>(self, run: impl FnOnce() -> T) -> T {
        OF_AGENTS.set(Some(self));
        let result = run();
        OF_AGENTS.set(None);
        result
    }

    /// Those that agents are to have which this thread starts.
    pub(crate) fn current() -> Option<Self> {
        OF_AGENTS.with_borrow(Clone::clone)
    }

    fn of(template: &PodTemplateSpec) -> Result<Self> {
        let pod = template.spec.as_ref().context("a pod")?;
        let [container] = pod.containers.as_slice() else {
            anyhow::bail!("one container is expected");
        };
        let of_pod = pod.security_context.clone().unwrap_or_default();
        let own = container.security_context.clone().unwrap_or_default();
        ensure!(own.privileged != Some(true), "privileged");
        ensure!(pod.host_network != Some(true), "in the node's network");
        let capabilities = own.capabilities.unwrap_or_default();
        ensure!(
            capabilities.drop == Some(vec!["ALL".to_owned()]),
            "capabilities are kept that nobody asks for"
        );
        let profile = own.seccomp_profile.or(of_pod.seccomp_profile);
        let number = |own: Option<i64>, of_pod: Option<i64>| -> Result<u32> {
            Ok(own.or(of_pod).context("no user is named")?.try_into()?)
        };
        let filtered = profile.is_some_and(|profile| profile.type_ == "RuntimeDefault");
        let added = capabilities.add.iter().flatten();
        let capabilities: BTreeSet<_> = added.map(|name| format!("CAP_{name}")).collect();
        let (node_folders, own_folders) = volumes(pod, container)?;
        Ok(Self {
            user: (
                number(own.run_as_user, of_pod.run_as_user)?,
                number(own.run_as_group, of_pod.run_as_group)?,
            ),
            volumes_group: of_pod.fs_group.map(u32::try_from).transpose()?,
            filter: filtered.then(|| capabilities.clone()),
            capabilities,
            read_only_root: own.read_only_root_filesystem == Some(true),
            no_new_privileges: own.allow_privilege_escalation == Some(false),
            host_pid: pod.host_pid == Some(true),
            node_folders,
            own_folders,
            memory_request: memory(container, |resources| resources.requests.as_ref())?,
            memory: memory(container, |resources| resources.limits.as_ref())?,
        })
    }
}

type NodeFolders = Vec<(PathBuf, PathBuf, bool)>;

/// The folders of the node, and those of the pod itself. Tokens are left out: there is no API server to give one.
fn volumes(pod: &PodSpec, container: &Container) -> Result<(NodeFolders, Vec<PathBuf>)> {
    let (mut node_s, mut own) = (Vec::new(), Vec::new());
    for mount in container.volume_mounts.iter().flatten() {
        let mut volumes = pod.volumes.iter().flatten();
        let volume = volumes
            .find(|volume| volume.name == mount.name)
            .with_context(|| format!("there is no volume {}", mount.name))?;
        let at = PathBuf::from(&mount.mount_path);
        if let Some(host) = &volume.host_path {
            node_s.push((PathBuf::from(&host.path), at, mount.read_only == Some(true)));
        } else if volume.empty_dir.is_some() || volume.persistent_volume_claim.is_some() {
            own.push(at);
        }
    }
    Ok((node_s, own))
}

type Quantities = BTreeMap<String, Quantity>;

fn memory(
    container: &Container,
    of: impl Fn(&ResourceRequirements) -> Option<&Quantities>,
) -> Result<u64> {
    let quantities = container.resources.as_ref().and_then(of);
    let Quantity(text) = quantities
        .and_then(|quantities| quantities.get("memory"))
        .context("memory is not bounded")?;
    let (number, shift) = [("Ki", 10), ("Mi", 20), ("Gi", 30)]
        .iter()
        .find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift)))
        .with_context(|| format!("memory: {text}"))?;
    Ok(number.parse::<u64>()? << shift)
}

/// The object of a kind in a file of the base.
fn object<T: DeserializeOwned>(file: &str, kind: &str) -> Result<T> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy/base")
        .join(file);
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    for document in serde_yaml::Deserializer::from_str(&text) {
        let value = Value::deserialize(document)?;
        if value["kind"] == kind {
            return Ok(serde_yaml::from_value(value)?);
        }
    }
    anyhow::bail!("{}: no {kind}", path.display())
}
