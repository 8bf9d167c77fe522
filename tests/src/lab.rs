//! A cluster that is up.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::PoisonError,
    time::SystemTime,
};

use anyhow::{Context, Result, ensure};

use crate::{
    cgroup,
    cluster::{Cluster, Pod},
    network::{self, Network},
    objects,
    place::Place,
    remains::{self, Claim},
};

/// A cluster that is up; it is gone when this is dropped.
#[derive(Debug)]
pub struct Lab {
    claim: Claim,
    cluster: Cluster,
    cgroups: PathBuf,
    folder: PathBuf,
}

impl Lab {
    /// Builds a cluster. What dead processes left of theirs is removed first.
    ///
    /// # Errors
    /// If it cannot be built; nothing of it is left then.
    pub fn start(cluster: Cluster) -> Result<Self> {
        ensure!(cluster.number < 1024, "addresses last for 1024 labs");
        ensure!(cluster.nodes.len() < 16, "addresses last for 15 nodes");
        ensure!(cluster.pods.len() < 240, "addresses last for 239 pods");
        ensure!(
            cluster.services.len() < 240,
            "addresses last for 239 services"
        );
        let _open = remains::GATE.read().unwrap_or_else(PoisonError::into_inner);
        remains::remove_stale()?;
        let cgroups = cgroup::mount()?;
        let claim = remains::claim()?;
        let lab = Self {
            cgroups: cgroups.join(&claim.name),
            folder: remains::folder(&claim.name),
            claim,
            cluster,
        };
        Network {
            lab: &lab.claim.name,
            cluster: &lab.cluster,
        }
        .create()?;
        let topology = objects::list(&lab.cluster, SystemTime::now())?;
        fs::write(lab.topology(), topology).context("the topology file")?;
        Ok(lab)
    }

    /// The start of the name of everything that it consists of.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.claim.name
    }

    /// The cluster.
    #[must_use]
    pub fn cluster(&self) -> &Cluster {
        &self.cluster
    }

    /// The file with the cluster's objects.
    #[must_use]
    pub fn topology(&self) -> PathBuf {
        self.folder.join("topology.yaml")
    }

    /// A folder for whatever belongs to this lab; it goes with it.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The directory that is the root of a node's cgroups.
    #[must_use]
    pub fn cgroup_root(&self, node: &str) -> PathBuf {
        self.cgroups.join(node)
    }

    /// Inside of a pod, which is asked for as `namespace/key`.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn pod(&self, path: &str) -> Result<Place> {
        let pod = self.spec(path)?;
        let nodes = &self.cluster.nodes;
        let node = nodes.iter().find(|node| node.name == pod.node);
        let node = node.with_context(|| format!("pod {path} is on no node"))?;
        let named = cgroup::of_pod(node, pod);
        let network = Some(self.network().pod(pod));
        if !node.v1 {
            return Ok(self.place(path, network, self.cgroup_root(&node.name).join(named)));
        }
        let runtime = "system.slice/containerd.service";
        let mut place = self.place(path, network, self.cgroup_root(&node.name).join(runtime));
        let mount = cgroup::v1_mount().context("no cgroup v1 hierarchy is mounted")?;
        place.v1_cgroup = Some(mount.join(self.name()).join(&node.name).join(named));
        Ok(place)
    }

    /// Beside the pods on a node, as its kubelet.
    #[must_use]
    pub fn node(&self, name: &str) -> Place {
        let cgroup = self.cgroup_root(name).join("system.slice/kubelet.service");
        self.place(name, Some(self.network().node(name)), cgroup)
    }

    /// Outside of the cluster, where [`crate::cluster::OUTSIDE`] is.
    #[must_use]
    pub fn outside(&self) -> Place {
        self.place(
            "outside",
            Some(self.network().fabric()),
            self.cgroups.join("outside"),
        )
    }

    /// On the machine itself, for programs that watch all nodes.
    #[must_use]
    pub fn host(&self) -> Place {
        self.place("host", None, self.cgroups.join("host"))
    }

    /// What was asked for as `namespace/key`.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn spec(&self, path: &str) -> Result<&Pod> {
        let mut pods = self.cluster.pods.iter();
        pods.find(|pod| pod.path() == path)
            .with_context(|| format!("there is no pod {path}"))
    }

    fn place(&self, name: &str, namespace: Option<String>, cgroup: PathBuf) -> Place {
        Place {
            name: name.to_owned(),
            namespace: namespace.as_deref().map(network::path),
            cgroup,
            v1_cgroup: None,
            processor: None,
        }
    }

    fn network(&self) -> Network<'_> {
        Network {
            lab: &self.claim.name,
            cluster: &self.cluster,
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = remains::remove(&self.claim.name) {
            eprintln!("cannot remove {}: {error:#}", self.claim.name);
        }
    }
}
