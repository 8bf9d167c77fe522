//! The templates of the Helm chart, made from the base and the components: so the chart cannot say anything else than they do.
//!
//! Each object becomes one file. What a component changes stands in the object between `if` and `end`, what it adds is a file
//! that is all between them. Where a value of the chart goes is told here, by kind and path.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Map, Value};

use super::{
    folder, kustomize, name,
    patch::{Op, Operation},
};

/// The namespace in the manifests, in whose place the release's goes.
const NAMESPACE: &str = "microshield";

/// Components, and the values that switch them on.
const SWITCHES: [(&str, &str); 5] = [
    ("beside-scope", ".Values.besideScope.enabled"),
    ("local-resolve", ".Values.localResolve.enabled"),
    ("mtls", ".Values.mtls.enabled"),
    ("prometheus", ".Values.prometheus.enabled"),
    ("sys-admin", ".Values.sysAdmin.enabled"),
];

/// Part of an object.
#[derive(Debug)]
enum Node {
    Scalar(Value),
    Map(Vec<(String, Item)>),
    List(Vec<Item>),
    /// A scalar with an action in it.
    Text(String),
}

/// Part of a map or a list, which may depend on values.
#[derive(Debug)]
struct Item {
    /// It is there only if this is true.
    when: Option<&'static str>,
    /// This is there instead, if that is true.
    instead: Vec<(&'static str, Node)>,
    /// The value that takes its place, if it is set.
    value: Option<&'static str>,
    node: Node,
}

/// An object, with the condition on which it exists.
#[derive(Debug)]
struct Template {
    when: Option<&'static str>,
    root: Node,
}

/// The templates by file name.
///
/// # Errors
/// If the folder is malformed, or changes in it meet.
pub fn templates() -> Result<BTreeMap<String, String>> {
    let mut templates = BTreeMap::new();
    for object in kustomize::render(&folder().join("base"))? {
        // Helm makes the namespace, or it is there.
        if object["kind"] != "Namespace" {
            insert(&mut templates, None, &object)?;
        }
    }
    for (component, when) in SWITCHES {
        let folder = folder().join("components").join(component);
        for object in kustomize::own_objects(&folder)? {
            insert(&mut templates, Some(when), &object)?;
        }
        for patch in kustomize::read(&folder)?.patches {
            let target = patch.target.to_string();
            let template = templates.get_mut(&target).context(target.clone())?;
            for operation in patch.operations()? {
                change(&mut template.root, &operation, when)
                    .with_context(|| format!("{component}: {target}"))?;
            }
        }
    }
    // After those of the components.
    for (name, args) in [
        ("DaemonSet/microshield-agent", ".Values.agent.extraArgs"),
        (
            "Deployment/microshield-generator",
            ".Values.generator.extraArgs",
        ),
    ] {
        let template = templates.get_mut(name).context(name)?;
        let way = ["spec", "template", "spec", "containers", "0", "args"];
        template.root.list(&way)?.push(Item::value_only(args));
    }
    Ok(templates
        .into_iter()
        .map(|(name, template)| {
            let file = format!("{}.yaml", name.to_lowercase().replace('/', "-"));
            (file, template.text())
        })
        .collect())
}

fn insert(
    templates: &mut BTreeMap<String, Template>,
    when: Option<&'static str>,
    object: &Value,
) -> Result<()> {
    let name = name(object)?;
    let mut root = Node::of("", object);
    fill(&name, &mut root)?;
    let before = templates.insert(name.clone(), Template { when, root });
    ensure!(before.is_none(), "there are two {name}");
    Ok(())
}

/// Puts the chart's values in their places.
fn fill(name: &str, root: &mut Node) -> Result<()> {
    let pod = ["spec", "template", "spec"];
    let container = [pod.as_slice(), &["containers", "0"]].concat();
    let part = match name {
        "DaemonSet/microshield-agent" => "agent",
        "Deployment/microshield-generator" => "generator",
        "PersistentVolumeClaim/microshield-generator" => {
            let size = root.item(&["spec", "resources", "requests", "storage"])?;
            size.node = Node::Text("{{ .Values.generator.storage.size }}".to_owned());
            let class = Node::Text("{{ .Values.generator.storage.className }}".to_owned());
            root.map(&["spec"])?.push((
                "storageClassName".to_owned(),
                Item::when(".Values.generator.storage.className", class),
            ));
            return Ok(());
        }
        _ => return Ok(()),
    };
    let (image, resources, selector) = if part == "agent" {
        (
            "{{ .Values.agent.image.repository }}:{{ .Values.agent.image.tag }}",
            ".Values.agent.resources",
            ".Values.agent.nodeSelector",
        )
    } else {
        (
            "{{ .Values.generator.image.repository }}:{{ .Values.generator.image.tag }}",
            ".Values.generator.resources",
            ".Values.generator.nodeSelector",
        )
    };
    let of_container = |field| [container.as_slice(), &[field]].concat();
    root.item(&of_container("image"))?.node = Node::Text(image.to_owned());
    root.item(&of_container("resources"))?.value = Some(resources);
    root.item(&[pod.as_slice(), &["nodeSelector"]].concat())?
        .value = Some(selector);
    if part == "agent" {
        root.item(&[pod.as_slice(), &["tolerations"]].concat())?
            .value = Some(".Values.agent.tolerations");
    }
    let secrets = Item::value_only(".Values.imagePullSecrets");
    root.map(&pod)?
        .push(("imagePullSecrets".to_owned(), secrets));
    Ok(())
}

/// Makes a component's change depend on its switch.
fn change(root: &mut Node, operation: &Operation, when: &'static str) -> Result<()> {
    let steps = operation.steps();
    let (last, way) = steps.split_last().context("the root is not replaced")?;
    let way: Vec<&str> = way.iter().map(String::as_str).collect();
    let node = Node::of(last, &operation.value);
    match operation.op {
        Op::Replace => {
            let way = [way.as_slice(), &[last]].concat();
            root.item(&way)?.instead.push((when, node));
        }
        Op::Add => match root.item_node(&way)? {
            Node::List(list) if last == "-" => list.push(Item::when(when, node)),
            Node::Map(map) => {
                ensure!(
                    map.iter().all(|(key, _)| key != last),
                    "{last} is there already: replace it"
                );
                map.push((last.clone(), Item::when(when, node)));
            }
            _ => bail!("nothing can be added to {way:?}"),
        },
    }
    Ok(())
}

impl Item {
    fn of(node: Node) -> Self {
        Self {
            when: None,
            instead: Vec::new(),
            value: None,
            node,
        }
    }

    fn when(when: &'static str, node: Node) -> Self {
        Self {
            when: Some(when),
            ..Self::of(node)
        }
    }

    /// Nothing but what a value says, if it is set; in a list, its elements after the others.
    fn value_only(value: &'static str) -> Self {
        Self {
            when: Some(value),
            value: Some(value),
            ..Self::of(Node::Scalar(Value::Null))
        }
    }
}

impl Node {
    fn of(key: &str, value: &Value) -> Self {
        match value {
            Value::Object(map) => Self::of_map(map),
            Value::Array(list) => {
                let items = list.iter().map(|value| Item::of(Self::of("", value)));
                Self::List(items.collect())
            }
            Value::String(text) if key == "namespace" && text == NAMESPACE => {
                Self::Text("{{ .Release.Namespace }}".to_owned())
            }
            Value::String(text) if text.starts_with("--") => {
                // Accounts, as NAMESPACE/NAME.
                let account = format!("={NAMESPACE}/");
                match text.split_once(&account) {
                    Some((option, name)) => {
                        Self::Text(format!("{option}={{{{ .Release.Namespace }}}}/{name}"))
                    }
                    None => Self::Scalar(value.clone()),
                }
            }
            _ => Self::Scalar(value.clone()),
        }
    }

    fn of_map(map: &Map<String, Value>) -> Self {
        let items = map
            .iter()
            .map(|(key, value)| (key.clone(), Item::of(Self::of(key, value))));
        Self::Map(items.collect())
    }

    fn item(&mut self, way: &[&str]) -> Result<&mut Item> {
        let (last, way) = way.split_last().context("the root is no item")?;
        match self.item_node(way)? {
            Self::Map(map) => map
                .iter_mut()
                .find(|(key, _)| key == last)
                .map(|(_, item)| item),
            Self::List(list) => last.parse().ok().and_then(|at: usize| list.get_mut(at)),
            _ => None,
        }
        .with_context(|| format!("nothing is at {last}"))
    }

    fn item_node(&mut self, way: &[&str]) -> Result<&mut Self> {
        match way {
            [] => Ok(self),
            _ => Ok(&mut self.item(way)?.node),
        }
    }

    fn map(&mut self, way: &[&str]) -> Result<&mut Vec<(String, Item)>> {
        match self.item_node(way)? {
            Self::Map(map) => Ok(map),
            other => bail!("{way:?} is no map: {other:?}"),
        }
    }

    fn list(&mut self, way: &[&str]) -> Result<&mut Vec<Item>> {
        match self.item_node(way)? {
            Self::List(list) => Ok(list),
            other => bail!("{way:?} is no list: {other:?}"),
        }
    }
}

impl Template {
    fn text(&self) -> String {
        let mut lines = Lines::default();
        lines.push(
            0,
            "{{- /* Made from deploy/base and deploy/components; deploy/README.md says how. */ -}}",
        );
        if let Some(when) = self.when {
            lines.push(0, &format!("{{{{- if {when} }}}}"));
        }
        lines.node(&self.root, 0);
        if self.when.is_some() {
            lines.push(0, "{{- end }}");
        }
        lines.0
    }
}

#[derive(Default)]
struct Lines(String);

impl Lines {
    fn push(&mut self, indent: usize, line: &str) {
        self.0.push_str(&format!("{:indent$}{line}\n", ""));
    }

    /// The lines of a map or a list.
    fn node(&mut self, node: &Node, indent: usize) {
        match node {
            Node::Map(map) => {
                for (key, item) in map {
                    self.item(item, indent, Some(key));
                }
            }
            Node::List(list) => {
                for item in list {
                    self.item(item, indent, None);
                }
            }
            Node::Scalar(_) | Node::Text(_) => {}
        }
    }

    /// An item with its key, or as an element of a list.
    fn item(&mut self, item: &Item, indent: usize, key: Option<&str>) {
        let action =
            |lines: &mut Self, text: &str| lines.push(indent, &format!("{{{{- {text} }}}}"));
        if let Some(when) = item.when {
            action(self, &format!("if {when}"));
        }
        let mut branches = 0;
        for (when, node) in &item.instead {
            let word = if branches == 0 { "if" } else { "else if" };
            action(self, &format!("{word} {when}"));
            self.entry(node, indent, key);
            branches += 1;
        }
        match item.value {
            Some(value) if item.when == Some(value) => self.value(value, indent, key),
            Some(value) => {
                let word = if branches == 0 { "if" } else { "else if" };
                action(self, &format!("{word} {value}"));
                self.value(value, indent, key);
                action(self, "else");
                self.entry(&item.node, indent, key);
                branches += 1;
            }
            None => {
                if branches > 0 {
                    action(self, "else");
                }
                self.entry(&item.node, indent, key);
            }
        }
        if branches > 0 {
            action(self, "end");
        }
        if item.when.is_some() {
            action(self, "end");
        }
    }

    /// What a value says.
    fn value(&mut self, value: &str, indent: usize, key: Option<&str>) {
        let inner = match key {
            Some(key) => {
                self.push(indent, &format!("{key}:"));
                indent + 2
            }
            None => indent,
        };
        self.push(
            inner,
            &format!("{{{{- toYaml {value} | nindent {inner} }}}}"),
        );
    }

    fn entry(&mut self, node: &Node, indent: usize, key: Option<&str>) {
        let prefix = key.map_or_else(|| "-".to_owned(), |key| format!("{}:", plain(key)));
        match node {
            Node::Scalar(Value::String(text)) if text.contains('\n') => {
                self.block(&prefix, text, indent)
            }
            Node::Scalar(value) => self.push(indent, &format!("{prefix} {}", scalar(value))),
            Node::Text(text) => self.push(indent, &format!("{prefix} \"{text}\"")),
            Node::Map(map) if map.is_empty() => self.push(indent, &format!("{prefix} {{}}")),
            Node::List(list) if list.is_empty() => self.push(indent, &format!("{prefix} []")),
            // The first line of an element stands behind its dash, unless it is an action.
            Node::Map(map)
                if key.is_none() && map.first().is_some_and(|(_, item)| item.is_plain()) =>
            {
                let mut inner = Self::default();
                inner.node(node, indent + 2);
                let text = inner.0.get(indent + 2..).unwrap_or_default();
                self.0.push_str(&format!("{:indent$}- {text}", ""));
            }
            _ => {
                self.push(indent, &prefix);
                self.node(node, indent + 2);
            }
        }
    }

    fn block(&mut self, prefix: &str, text: &str, indent: usize) {
        let (sign, text) = match text.strip_suffix('\n') {
            Some(text) => ("|", text),
            None => ("|-", text),
        };
        self.push(indent, &format!("{prefix} {sign}"));
        for line in text.split('\n') {
            if line.is_empty() {
                self.push(0, "");
            } else {
                self.push(indent + 2, &escape(line));
            }
        }
    }
}

impl Item {
    fn is_plain(&self) -> bool {
        self.when.is_none() && self.instead.is_empty() && self.value.is_none()
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => plain(text),
        other => other.to_string(),
    }
}

/// Without quotes where that cannot be misread.
fn plain(text: &str) -> String {
    let mut bytes = text.bytes();
    let harmless = bytes
        .next()
        .is_some_and(|first| first.is_ascii_alphabetic() || first == b'/')
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"-_./".contains(&byte));
    let word = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"]
        .contains(&text.to_ascii_lowercase().as_str());
    if harmless && !word {
        text.to_owned()
    } else {
        escape(&Value::from(text).to_string())
    }
}

/// What Helm would take for an action.
fn escape(text: &str) -> String {
    text.replace("{{", "{{ \"{{\" }}")
}
