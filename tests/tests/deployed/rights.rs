//! The manifests at a real kube-apiserver: it takes them, and the rights of the service accounts are those that the programs
//! use, and no others.

use std::{collections::BTreeSet, net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use flow::source::{self, Access, Options, Pace, Scope, Source, Topology};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use kube::{Api, Client, api::PostParams};
use lab::{
    RealApi,
    deployment::{self, FEATURES, kustomize, name},
};
use libtest_mimic::Trial;
use serde_json::{Value, json};
use tokio_tungstenite::{
    connect_async,
    tungstenite::{Error, client::IntoClientRequest as _},
};

use crate::{from_cluster::Generator, test};

const NAMESPACE: &str = "microshield";

/// Everything that can be asked for, with the verbs that RBAC knows besides those of the API.
const VERBS: [&str; 13] = [
    "get",
    "list",
    "watch",
    "create",
    "update",
    "patch",
    "delete",
    "deletecollection",
    "bind",
    "escalate",
    "impersonate",
    "use",
    "approve",
];

/// Who may do what: namespace (empty for all), verb, group, resource with subresource, name.
type Right = (String, &'static str, String, String, String);

pub(crate) fn tests() -> Vec<Trial> {
    vec![
        test("rights::manifests_are_taken_and_removed", manifests),
        test("rights::of_the_service_accounts", rights),
        test("rights::programs_work_with_them", programs),
    ]
}

fn deploy(overlay: &str) -> String {
    deployment::folder().join(overlay).display().to_string()
}

async fn manifests() -> Result<()> {
    let api = RealApi::start().await?;
    // The Prometheus operator's type, whose fields are its own business.
    let schema = json!({"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}});
    let definition = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": "servicemonitors.monitoring.coreos.com"},
        "spec": {
            "group": "monitoring.coreos.com", "scope": "Namespaced",
            "names": {"kind": "ServiceMonitor", "plural": "servicemonitors"},
            "versions": [{"name": "v1", "served": true, "storage": true, "schema": schema}],
        },
    });
    api.kubectl(&["create", "-f", "-"], Some(&definition))?;
    let crd = "crd/servicemonitors.monitoring.coreos.com";
    api.kubectl(
        &["wait", "--for=condition=Established", crd, "--timeout=60s"],
        None,
    )?;
    let base = deploy("base");
    api.kubectl(&["apply", "-f", &format!("{base}/namespace.yaml")], None)?;
    for overlay in FEATURES.map(|feature| format!("overlays/{feature}")) {
        let path = deploy(&overlay);
        api.kubectl(&["apply", "-k", &path, "--dry-run=server"], None)
            .with_context(|| overlay.clone())?;
    }
    for overlay in [".".to_owned()]
        .into_iter()
        .chain(FEATURES.map(|feature| format!("overlays/{feature}")))
    {
        let path = deploy(&overlay);
        api.kubectl(&["apply", "-k", &path], None)
            .with_context(|| overlay.clone())?;
        // What is there is what was meant: nothing is left to change.
        let again = api.kubectl(&["apply", "-k", &path], None)?;
        let changed: Vec<&str> = again
            .lines()
            .filter(|line| !line.ends_with(" unchanged"))
            .collect();
        ensure!(changed.is_empty(), "{overlay}: {changed:?}");
        api.kubectl(
            &["delete", "-k", &path, "--wait=false", "--ignore-not-found"],
            None,
        )?;
        for object in kustomize::render(&deployment::folder().join(&overlay))? {
            let name = name(&object)?;
            let namespace = object["metadata"]["namespace"].as_str();
            let namespace = namespace.unwrap_or_default();
            let output = "jsonpath={.metadata.name} {.metadata.deletionTimestamp}";
            let words = [
                "-n",
                namespace,
                "get",
                &name,
                "--ignore-not-found",
                "-o",
                output,
            ];
            let left = api.kubectl(&words, None)?;
            // What waits for a controller goes: nobody is there who would do it.
            ensure!(
                left.is_empty() || !left.ends_with(' '),
                "{overlay}: {left} is left"
            );
        }
        // It comes back for the next.
        finalize(&api)?;
    }
    Ok(())
}

/// Does what the controllers of claims and of namespaces would.
fn finalize(api: &RealApi) -> Result<()> {
    let claim = "pvc/microshield-generator";
    let none = "{\"metadata\":{\"finalizers\":null}}";
    api.kubectl(
        &["-n", NAMESPACE, "patch", claim, "--type=merge", "-p", none],
        None,
    )?;
    let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE},
        "spec": {"finalizers": []}});
    let path = format!("/api/v1/namespaces/{NAMESPACE}/finalize");
    api.kubectl(&["replace", "--raw", &path, "-f", "-"], Some(&namespace))?;
    Ok(())
}

/// Everything that the API server has, as group and resource with subresource.
fn resources(api: &RealApi) -> Result<BTreeSet<(String, String)>> {
    let get = |path: &str| -> Result<Value> {
        Ok(serde_json::from_str(
            &api.kubectl(&["get", "--raw", path], None)?,
        )?)
    };
    let mut all = BTreeSet::new();
    let mut add = |group: &str, list: &Value| {
        for resource in list["resources"].as_array().into_iter().flatten() {
            if let Some(name) = resource["name"].as_str() {
                all.insert((group.to_owned(), name.to_owned()));
            }
        }
    };
    add("", &get("/api/v1")?);
    for group in get("/apis")?["groups"].as_array().into_iter().flatten() {
        for version in group["versions"].as_array().into_iter().flatten() {
            let path = version["groupVersion"].as_str().unwrap_or_default();
            let name = group["name"].as_str().unwrap_or_default();
            add(name, &get(&format!("/apis/{path}"))?);
        }
    }
    ensure!(all.len() > 80, "{all:?}");
    Ok(all)
}

/// What a user may do, of everything.
async fn may(
    client: &Client,
    resources: &BTreeSet<(String, String)>,
    user: &str,
    name: &str,
) -> Result<BTreeSet<Right>> {
    let reviews: Api<SubjectAccessReview> = Api::all(client.clone());
    let mut questions = Vec::new();
    for namespace in ["", NAMESPACE, "default"] {
        for (group, resource) in resources {
            for verb in VERBS {
                questions.push((
                    namespace.to_owned(),
                    verb,
                    group.clone(),
                    resource.clone(),
                    name.to_owned(),
                ));
            }
        }
    }
    let asked = stream::iter(questions).map(async |right: Right| {
        let answer = reviews
            .create(&PostParams::default(), &review(user, &right))
            .await?;
        let allowed = answer.status.is_some_and(|status| status.allowed);
        Ok::<_, kube::Error>(allowed.then_some(right))
    });
    let answers: Vec<Option<Right>> = asked.buffer_unordered(8).try_collect().await?;
    Ok(answers.into_iter().flatten().collect())
}

/// The question whether a user has a right.
fn review(user: &str, (namespace, verb, group, resource, name): &Right) -> SubjectAccessReview {
    let (kind, subresource) = resource.split_once('/').unwrap_or((resource, ""));
    let groups = [
        "system:serviceaccounts",
        &format!("system:serviceaccounts:{NAMESPACE}"),
        "system:authenticated",
    ];
    SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(user.to_owned()),
            groups: Some(groups.map(str::to_owned).into()),
            resource_attributes: Some(ResourceAttributes {
                namespace: Some(namespace.clone()),
                verb: Some((*verb).to_owned()),
                group: Some(group.clone()),
                resource: Some(kind.to_owned()),
                subresource: Some(subresource.to_owned()),
                name: Some(name.clone()),
                ..ResourceAttributes::default()
            }),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    }
}

/// Rights in some namespaces.
fn right(
    namespaces: &[&str],
    verbs: &[&'static str],
    group: &str,
    resource: &str,
    name: &str,
) -> BTreeSet<Right> {
    let each = namespaces.iter().flat_map(|namespace| {
        verbs.iter().map(|verb| {
            (
                (*namespace).to_owned(),
                *verb,
                group.to_owned(),
                resource.to_owned(),
                name.to_owned(),
            )
        })
    });
    each.collect()
}

fn reading(kinds: &[(&str, &str)]) -> BTreeSet<Right> {
    let each = kinds.iter().flat_map(|(group, resource)| {
        right(
            &["", NAMESPACE, "default"],
            &["get", "list", "watch"],
            group,
            resource,
            "",
        )
    });
    each.collect()
}

async fn rights() -> Result<()> {
    let api = RealApi::start().await?;
    let client = source::client(&api.access("admin")).await?;
    let all = resources(&api)?;
    let account = |name: &str| format!("system:serviceaccount:{NAMESPACE}:{name}");
    let both_ends = [
        ("", "nodes"),
        ("", "pods"),
        ("", "services"),
        ("discovery.k8s.io", "endpointslices"),
    ];
    let review: BTreeSet<Right> = right(
        &["", NAMESPACE, "default"],
        &["create"],
        "authentication.k8s.io",
        "tokenreviews",
        "",
    )
    .into_iter()
    .chain(right(&[NAMESPACE], &["get"], "", "pods", ""))
    .collect();
    for (overlay, agent, generator) in [
        (".", reading(&both_ends), review.clone()),
        (
            "overlays/local-resolve",
            reading(&both_ends[..2]),
            reading(&[&both_ends[..], &[("", "namespaces")]].concat())
                .union(&review)
                .cloned()
                .collect(),
        ),
    ] {
        api.kubectl(&["apply", "-k", &deploy(overlay)], None)?;
        let anybody = may(&client, &all, &account("nobody"), "").await?;
        for (name, wanted) in [
            ("microshield-agent", agent),
            ("microshield-generator", generator),
            ("microshield-reader", BTreeSet::new()),
        ] {
            let found = may(&client, &all, &account(name), "").await?;
            let own: BTreeSet<Right> = found.difference(&anybody).cloned().collect();
            ensure!(
                own == wanted,
                "{overlay}: {name}: more: {:?}, less: {:?}",
                own.difference(&wanted),
                wanted.difference(&own)
            );
        }
    }
    // A person with the readers' role.
    let words = [
        "-n",
        NAMESPACE,
        "create",
        "rolebinding",
        "readers",
        "--role=microshield-reader",
        "--user=ann",
    ];
    api.kubectl(&words, None)?;
    let anybody = may(&client, &all, "bob", "microshield-reader").await?;
    let found = may(&client, &all, "ann", "microshield-reader").await?;
    let own: BTreeSet<Right> = found.difference(&anybody).cloned().collect();
    let name = "microshield-reader";
    let wanted: BTreeSet<Right> = right(&[NAMESPACE], &["list"], "", "pods", name)
        .into_iter()
        .chain(right(
            &[NAMESPACE],
            &["create", "get"],
            "",
            "pods/portforward",
            name,
        ))
        .chain(right(
            &[NAMESPACE],
            &["create"],
            "",
            "serviceaccounts/token",
            name,
        ))
        .collect();
    ensure!(own == wanted, "{own:?}");
    let anybody = may(&client, &all, "bob", "microshield-agent").await?;
    let found = may(&client, &all, "ann", "microshield-agent").await?;
    let token = |right: &&Right| right.3 == "serviceaccounts/token";
    ensure!(found.difference(&anybody).find(token).is_none());
    Ok(())
}

/// A kubeconfig with a token of a service account.
fn as_account(api: &RealApi, account: &str) -> Result<Access> {
    let words = ["-n", NAMESPACE, "create", "token", account];
    let token = api.kubectl(&words, None)?;
    Ok(Access {
        kubeconfig: Some(api.kubeconfig(account, token.trim())?),
        context: None,
    })
}

async fn knows_everything(access: Access, scope: Scope) -> Result<()> {
    let options = Options {
        access,
        scope,
        jitter: Duration::ZERO,
        pace: Pace::default(),
    };
    let topology = Topology::start(&Source::Kube, options).await?;
    for _ in 0..300 {
        if topology.view().is_ready() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("the cluster's objects are not known")
}

async fn programs() -> Result<()> {
    let api = RealApi::start().await?;
    api.kubectl(&["apply", "-k", &deploy(".")], None)?;
    let agent = as_account(&api, "microshield-agent")?;
    knows_everything(agent.clone(), Scope::BothEnds).await?;
    api.kubectl(&["apply", "-k", &deploy("overlays/local-resolve")], None)?;
    knows_everything(agent, Scope::OneNode("node-1".to_owned())).await?;
    let generator = as_account(&api, "microshield-generator")?;
    knows_everything(generator.clone(), Scope::Everything).await?;

    // An agent's pod, for its token to be bound to.
    let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "agent-1", "namespace": NAMESPACE},
        "spec": {"serviceAccountName": "microshield-agent", "nodeName": "node-1",
            "containers": [{"name": "agent", "image": "none"}]}});
    api.kubectl(&["create", "-f", "-"], Some(&pod))?;
    let token = |account: &str, words: &[&str]| -> Result<String> {
        let words = [&["-n", NAMESPACE, "create", "token", account], words].concat();
        Ok(api.kubectl(&words, None)?.trim().to_owned())
    };
    let bound = ["--bound-object-kind=Pod", "--bound-object-name=agent-1"];
    let audience = "--audience=microshield";
    let agent = token("microshield-agent", &[&bound[..], &[audience]].concat())?;
    let reader = token("microshield-reader", &[audience])?;
    let unbound = token("microshield-agent", &[audience])?;
    let for_the_api = token("microshield-agent", &bound)?;

    let folder = tempfile::tempdir()?;
    let kubeconfig = generator.kubeconfig.context("no kubeconfig")?;
    let generator = Generator::start(folder.path(), &kubeconfig, &[])?;
    for (name, token, as_agent, as_reader) in [
        ("agent", &agent, 101, 401),
        ("reader", &reader, 401, 200),
        ("unbound", &unbound, 401, 401),
        ("for the API", &for_the_api, 401, 401),
    ] {
        for (path, wanted) in [("agents", as_agent), ("v1/status", as_reader)] {
            let status = answered(generator.address, path, token).await;
            let status = status.with_context(|| format!("{name}: {path}"))?;
            ensure!(status == wanted, "{name}: {path}: {status}");
        }
    }
    Ok(())
}

/// The status that a token is answered with.
async fn answered(address: SocketAddr, path: &str, token: &str) -> Result<u16> {
    let mut request = format!("ws://{address}/{path}").into_client_request()?;
    let headers = request.headers_mut();
    headers.insert("authorization", format!("Bearer {token}").parse()?);
    headers.insert("sec-websocket-protocol", flow::wire::SUBPROTOCOL.parse()?);
    match connect_async(request).await {
        Ok((_, response)) => Ok(response.status().as_u16()),
        Err(Error::Http(response)) => Ok(response.status().as_u16()),
        Err(error) => Err(error.into()),
    }
}
