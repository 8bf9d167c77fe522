//! Objects as the API has them.

use serde_json::{Value, json};

/// A running pod.
pub(crate) fn pod(name: &str, node: &str, address: &str) -> Value {
    json!({
        "metadata": {
            "namespace": "shop", "name": name, "uid": uid(name), "creationTimestamp": "2026-11-21T20:00:00Z",
            "labels": {"app": name.split('-').next()},
        },
        "spec": {"nodeName": node, "containers": [{"name": "main"}]},
        "status": {
            "phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "startTime": "2026-11-21T20:00:00Z",
        },
    })
}

/// A pod's uid in these tests.
pub(crate) fn uid(name: &str) -> String {
    format!("uid-{name}")
}

/// A service that selects the pods whose name begins with its own.
pub(crate) fn service(name: &str, address: &str, port: u16, target: u16) -> Value {
    json!({
        "metadata": {"namespace": "shop", "name": name, "uid": uid(name), "creationTimestamp": "2026-11-21T20:00:00Z"},
        "spec": {
            "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "selector": {"app": name},
            "ports": [{"port": port, "targetPort": target, "protocol": "TCP"}],
        },
    })
}

/// A node.
pub(crate) fn node(name: &str, address: &str, range: &str) -> Value {
    json!({
        "metadata": {"name": name, "uid": uid(name), "creationTimestamp": "2026-11-21T20:00:00Z"},
        "spec": {"podCIDR": range, "podCIDRs": [range]},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]},
    })
}

/// A namespace.
pub(crate) fn namespace(name: &str) -> Value {
    json!({"metadata": {"name": name, "uid": uid(name), "labels": {"kubernetes.io/metadata.name": name}}})
}
