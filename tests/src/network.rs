//! The lab's networks: what is handed to `ip` and `nft`, and how a namespace is entered.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

use crate::cluster::{Cluster, OUTSIDE, Pod};

/// Where `ip netns` keeps its namespaces.
pub(crate) const NAMESPACES: &str = "/run/netns";

/// The namespace of the network between the nodes, and of everything outside of the cluster.
pub(crate) const FABRIC: &str = "fabric";

/// The namespaces of a lab's network, by what they belong to.
pub(crate) struct Network<'a> {
    /// The lab's name.
    pub(crate) lab: &'a str,
    /// The cluster that it is for.
    pub(crate) cluster: &'a Cluster,
}

impl Network<'_> {
    /// Makes all of it.
    ///
    /// Pods have a host route to their gateway and no other: everything they send is routed by their node, so service
    /// addresses work between neighbours without the bridge handing its frames to netfilter, and a pod that calls
    /// itself gets its own packets back without hairpin mode.
    ///
    /// # Errors
    /// What `ip` or `nft` says, with the command that it does not like.
    pub(crate) fn create(&self) -> Result<()> {
        let own_pods = || self.cluster.pods.iter().filter(|pod| !pod.host_network);
        let mut batch = format!("netns add {}\n", self.fabric());
        for node in &self.cluster.nodes {
            writeln!(batch, "netns add {}", self.node(&node.name))?;
        }
        for pod in own_pods() {
            writeln!(batch, "netns add {}", self.pod(pod))?;
        }
        ip(None, &batch)?;

        for node in &self.cluster.nodes {
            self.prepare(&self.node(&node.name))?;
        }
        self.prepare(&self.fabric())?;
        for pod in own_pods() {
            self.prepare(&self.pod(pod))?;
        }

        let mut batch = String::new();
        for node in &self.cluster.nodes {
            writeln!(
                batch,
                "link add eth0 netns {} type veth peer name port{} netns {}",
                self.node(&node.name),
                node.number,
                self.fabric(),
            )?;
        }
        for (index, pod) in self.cluster.pods.iter().enumerate() {
            if !pod.host_network {
                writeln!(
                    batch,
                    "link add eth0 netns {} type veth peer name veth{index} netns {}",
                    self.pod(pod),
                    self.node(&pod.node),
                )?;
            }
        }
        ip(None, &batch)?;

        ip(Some(&self.fabric()), &self.fabric_batch()?)?;
        for node in &self.cluster.nodes {
            let name = self.node(&node.name);
            ip(Some(&name), &self.node_batch(&node.name)?)?;
            nft(&path(&name), &crate::services::ruleset(self.cluster, node))?;
        }
        for pod in own_pods() {
            ip(Some(&self.pod(pod)), &self.pod_batch(pod)?)?;
        }
        Ok(())
    }

    pub(crate) fn fabric(&self) -> String {
        format!("{}-{FABRIC}", self.lab)
    }

    pub(crate) fn node(&self, name: &str) -> String {
        format!("{}-{name}", self.lab)
    }

    pub(crate) fn pod(&self, pod: &Pod) -> String {
        if pod.host_network {
            return self.node(&pod.node);
        }
        format!("{}-{}.{}", self.lab, pod.namespace, pod.key)
    }

    /// Sets what has to stand before there are devices.
    fn prepare(&self, namespace: &str) -> Result<()> {
        inside(&path(namespace), || {
            for (key, value) in [
                ("ipv4/ip_forward", "1"),
                ("ipv6/conf/all/forwarding", "1"),
                // Addresses are usable at once: nobody else can have them.
                ("ipv6/conf/all/accept_dad", "0"),
                ("ipv6/conf/default/accept_dad", "0"),
                // A pod that was told of a shorter way to its neighbour would bypass the translation of replies.
                ("ipv4/conf/all/send_redirects", "0"),
                ("ipv4/conf/default/send_redirects", "0"),
                ("ipv6/conf/all/accept_redirects", "0"),
                ("ipv6/conf/default/accept_redirects", "0"),
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/default/rp_filter", "0"),
                ("ipv4/ip_local_port_range", "1024 65535"),
            ] {
                let file = Path::new("/proc/sys/net").join(key);
                fs::write(&file, value).with_context(|| file.display().to_string())?;
            }
            for key in ["iptables", "ip6tables"] {
                // Only there while the module `br_netfilter` is loaded.
                let file = format!("/proc/sys/net/bridge/bridge-nf-call-{key}");
                if Path::new(&file).exists() {
                    fs::write(&file, "0").context(file)?;
                }
            }
            Ok(())
        })
    }

    fn fabric_batch(&self) -> Result<String> {
        let mut batch = String::from("link set lo up\n");
        bridge(&mut batch, "fabric", &self.cluster.exit(), &["24", "64"])?;
        for node in &self.cluster.nodes {
            writeln!(batch, "link set port{} master fabric up", node.number)?;
        }
        for address in OUTSIDE {
            writeln!(batch, "address add {address} dev lo")?;
        }
        Ok(batch)
    }

    fn node_batch(&self, name: &str) -> Result<String> {
        let mut batch = String::from("link set lo up\nlink set eth0 up\n");
        for (index, pod) in self.cluster.pods.iter().enumerate() {
            if pod.node == name && !pod.host_network {
                writeln!(batch, "link set veth{index} up")?;
            }
        }
        for node in &self.cluster.nodes {
            let uplink = node.addresses();
            if node.name == name {
                bridge(&mut batch, "cni0", &node.gateway(), &["24", "64"])?;
                writeln!(batch, "address add {}/24 dev eth0", uplink[0])?;
                writeln!(batch, "address add {}/64 dev eth0 nodad", uplink[1])?;
            }
        }
        for (index, pod) in self.cluster.pods.iter().enumerate() {
            if pod.node == name && !pod.host_network {
                writeln!(batch, "link set veth{index} master cni0")?;
            }
        }
        for node in self.cluster.nodes.iter().filter(|node| node.name != name) {
            for (cidr, hop) in node.pod_cidrs().iter().zip(node.addresses()) {
                writeln!(batch, "route add {cidr} via {hop}")?;
            }
        }
        for hop in self.cluster.exit() {
            writeln!(batch, "route add default via {hop}")?;
        }
        Ok(batch)
    }

    fn pod_batch(&self, pod: &Pod) -> Result<String> {
        let mut batch = String::from("link set lo up\nlink set eth0 up\n");
        for address in self.cluster.addresses(pod) {
            writeln!(batch, "address add {address} dev eth0 nodad")?;
        }
        let node = self.cluster.nodes.iter().find(|node| node.name == pod.node);
        for hop in node.context("a pod without a node")?.gateway() {
            writeln!(batch, "route add {hop} dev eth0")?;
            writeln!(batch, "route add default via {hop}")?;
        }
        Ok(batch)
    }
}

/// Runs `work` in a thread of its own that is inside of a network namespace; what it starts is inside too.
///
/// # Errors
/// If the namespace cannot be entered, and those of `work`.
pub(crate) fn inside<T: Send>(
    namespace: &Path,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    let in_namespace = || {
        let file = File::open(namespace)?;
        setns(file, CloneFlags::CLONE_NEWNET)?;
        work()
    };
    thread::scope(|scope| scope.spawn(in_namespace).join())
        .map_err(|panic| anyhow!("a thread panicked: {panic:?}"))?
        .with_context(|| format!("in {}", namespace.display()))
}

/// The file of a named namespace.
pub(crate) fn path(namespace: &str) -> PathBuf {
    Path::new(NAMESPACES).join(namespace)
}

/// Applies a ruleset inside of a namespace.
///
/// # Errors
/// What `nft` says.
pub(crate) fn nft(namespace: &Path, ruleset: &str) -> Result<()> {
    inside(namespace, || {
        feed(Command::new("nft").args(["-f", "-"]), ruleset)
    })
}

/// Has a processor handle what arrives at a pod's interface.
///
/// # Errors
/// If the namespace has none, or the kernel refuses.
pub(crate) fn steer_packets(namespace: &Path, processor: usize) -> Result<()> {
    let mask = 1_u64 << processor;
    // A namespace's interfaces are in a sysfs that was mounted inside of it, which this does.
    let mut command = Command::new("ip");
    command.args(["netns", "exec"]);
    command.args(namespace.file_name());
    command.args(["tee", "/sys/class/net/eth0/queues/rx-0/rps_cpus"]);
    feed(&mut command, &format!("{mask:x}"))
}

/// Has `ip` carry out a list of commands, inside of a namespace if one is given.
///
/// # Errors
/// What `ip` says.
pub(crate) fn ip(namespace: Option<&str>, batch: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(namespace) = namespace {
        command.args(["-n", namespace]);
    }
    feed(command.args(["-batch", "-"]), batch)
}

fn bridge(
    batch: &mut String,
    name: &str,
    addresses: &[std::net::IpAddr; 2],
    prefixes: &[&str; 2],
) -> Result<()> {
    // Without snooping, neighbour solicitations reach a port in its first second too.
    writeln!(batch, "link add {name} type bridge mcast_snooping 0")?;
    writeln!(batch, "link set {name} up")?;
    writeln!(
        batch,
        "address add {}/{} dev {name}",
        addresses[0], prefixes[0]
    )?;
    writeln!(
        batch,
        "address add {}/{} dev {name} nodad",
        addresses[1], prefixes[1]
    )?;
    Ok(())
}

fn feed(command: &mut Command, input: &str) -> Result<()> {
    let name = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| name.clone())?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that stopped reading says why on its standard error.
        if let Err(error) = stdin.write_all(input.as_bytes())
            && error.kind() != std::io::ErrorKind::BrokenPipe
        {
            return Err(error).context(name);
        }
    }
    let output = child.wait_with_output().with_context(|| name.clone())?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        // `ip` gives the number of the line, `nft` quotes it.
        let line = message
            .rsplit_once("Command failed -:")
            .and_then(|(_, number)| number.trim().parse::<usize>().ok())
            .and_then(|number| input.lines().nth(number.checked_sub(1)?));
        bail!("{name}: {}: {}", line.unwrap_or("failed"), message.trim());
    }
    Ok(())
}
