//! A real kube-apiserver, where there is one. Objects are created, changed and deleted by a real `kubectl`.

use anyhow::Result;
use flow::source::Access;
use lab::RealApi;
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::{
    suite::{self, Api},
    test,
};

pub(crate) fn tests() -> Vec<Trial> {
    vec![test("suite::real_api_server", || async {
        suite::run(&Api::Real(Real::start().await?)).await
    })]
}

/// A running API server with a viewer who may read everything but services.
pub(crate) struct Real(RealApi);

impl Real {
    pub(crate) async fn start() -> Result<Self> {
        let api = Self(RealApi::start().await?);
        api.grant_all_but_services()?;
        Ok(api)
    }

    pub(crate) fn admin(&self) -> Access {
        self.0.access("admin")
    }

    pub(crate) fn viewer(&self) -> Access {
        self.0.access("viewer")
    }

    pub(crate) async fn put(&self, resource: &str, object: &Value) -> Result<()> {
        let mut object = complete(resource, object);
        let status = object
            .as_object_mut()
            .and_then(|object| object.remove("status"));
        self.kubectl(
            &["apply", "--server-side", "--force-conflicts", "-f", "-"],
            Some(&object),
        )?;
        if let Some(status) = status {
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            let path = match object["metadata"]["namespace"].as_str() {
                Some(namespace) => {
                    format!("/api/v1/namespaces/{namespace}/{resource}/{name}/status")
                }
                None => format!("/api/v1/{resource}/{name}/status"),
            };
            object["status"] = status;
            self.kubectl(&["replace", "--raw", &path, "-f", "-"], Some(&object))?;
        }
        Ok(())
    }

    pub(crate) async fn delete(&self, resource: &str, name: &str) -> Result<()> {
        let now = ["--grace-period=0", "--force", "--wait=true"];
        let words = [&["-n", "shop", "delete", resource, name][..], &now].concat();
        self.kubectl(&words, None)
    }

    fn grant_all_but_services(&self) -> Result<()> {
        let role = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "viewer"},
            "rules": [
                {"apiGroups": [""], "resources": ["namespaces", "nodes", "pods"], "verbs": ["get", "list", "watch"]},
                {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["get", "list", "watch"]},
            ],
        });
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "viewer"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "viewer"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "viewer"}],
        });
        self.kubectl(&["create", "-f", "-"], Some(&role))?;
        self.kubectl(&["create", "-f", "-"], Some(&binding))
    }

    fn kubectl(&self, words: &[&str], input: Option<&Value>) -> Result<()> {
        self.0.kubectl(words, input)?;
        Ok(())
    }
}

/// What a real server asks for and a test does not care for.
fn complete(resource: &str, object: &Value) -> Value {
    let mut object = object.clone();
    object["apiVersion"] = "v1".into();
    let kind = match resource {
        "pods" => "Pod",
        "services" => "Service",
        "nodes" => "Node",
        _ => "Namespace",
    };
    object["kind"] = kind.into();
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.remove("uid");
        metadata.remove("creationTimestamp");
    }
    if kind == "Pod" {
        object["spec"]["containers"][0]["image"] = "none".into();
    }
    object
}
