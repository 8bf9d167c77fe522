//! The Helm chart: its templates are made from the base and the components, and render to the same objects.
//!
//! Helm's templates are Go's. Here a Rust implementation of them renders (gtmpl, with the four functions that the chart uses);
//! `tests/deployed` has the same with Helm itself, where it is installed.

use std::{
    collections::{BTreeMap, HashMap},
    fs,
};

use gtmpl::{Context, FuncError, Template, Value as Gtmpl};
use lab::deployment::{self, FEATURES, Objects, by_name, chart, differences, documents, kustomize};
use serde_json::{Value, json};

fn folder() -> std::path::PathBuf {
    deployment::folder().join("helm/microshield")
}

/// `UPDATE_GOLDEN=1` writes them anew.
#[test]
fn the_templates_are_made_from_the_base_and_the_components() {
    let wanted = chart::templates().unwrap_or_else(|error| panic!("{error:#}"));
    let folder = folder().join("templates");
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name.ends_with(".yaml") {
            found.insert(name.clone(), fs::read_to_string(folder.join(name)).unwrap());
        }
    }
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        for name in found.keys() {
            fs::remove_file(folder.join(name)).unwrap();
        }
        for (name, text) in &wanted {
            fs::write(folder.join(name), text).unwrap();
        }
    } else {
        let hint = "UPDATE_GOLDEN=1 cargo test -p tests --test manifests chart";
        let names = |files: &BTreeMap<String, String>| files.keys().cloned().collect::<Vec<_>>();
        assert_eq!(names(&found), names(&wanted), "{hint}");
        for (name, text) in &wanted {
            assert_eq!(&found[name], text, "{name}: {hint}");
        }
    }
}

fn values() -> Value {
    let text = fs::read_to_string(folder().join("values.yaml")).unwrap();
    serde_yaml::from_str(&text).unwrap()
}

/// What the chart renders to.
fn render(values: &Value) -> Objects {
    let input =
        json!({"Values": values, "Release": {"Namespace": "microshield", "Name": "microshield"}});
    let input = to_gtmpl(&input);
    let mut objects = Vec::new();
    for (name, text) in chart::templates().unwrap() {
        let mut template = Template::default();
        template.add_func("toYaml", to_yaml);
        template.add_func("nindent", nindent);
        template
            .parse(&text)
            .unwrap_or_else(|error| panic!("{name}: {error}\n{text}"));
        let text = template
            .render(&Context::from(input.clone()))
            .unwrap_or_else(|error| panic!("{name}: {error}"));
        objects.extend(documents(&text).unwrap_or_else(|error| panic!("{name}: {error}\n{text}")));
    }
    by_name(objects).unwrap()
}

fn to_yaml(args: &[Gtmpl]) -> Result<Gtmpl, FuncError> {
    let [value] = args else {
        return Err(FuncError::ExactlyXArgs("toYaml".to_owned(), 1));
    };
    let text = serde_yaml::to_string(&from_gtmpl(value)).unwrap();
    Ok(text.trim_end().into())
}

fn nindent(args: &[Gtmpl]) -> Result<Gtmpl, FuncError> {
    let [Gtmpl::Number(width), Gtmpl::String(text)] = args else {
        return Err(FuncError::ExactlyXArgs("nindent".to_owned(), 2));
    };
    let width = usize::try_from(width.as_i64().unwrap()).unwrap();
    let lines = text.lines().map(|line| format!("\n{:width$}{line}", ""));
    Ok(lines.collect::<String>().into())
}

fn to_gtmpl(value: &Value) -> Gtmpl {
    match value {
        Value::Null => Gtmpl::Nil,
        Value::Bool(value) => (*value).into(),
        Value::Number(number) => number.as_i64().unwrap().into(),
        Value::String(text) => text.as_str().into(),
        Value::Array(list) => Gtmpl::Array(list.iter().map(to_gtmpl).collect()),
        Value::Object(map) => {
            let fields = map
                .iter()
                .map(|(key, value)| (key.clone(), to_gtmpl(value)));
            Gtmpl::Object(fields.collect::<HashMap<_, _>>())
        }
    }
}

fn from_gtmpl(value: &Gtmpl) -> Value {
    match value {
        Gtmpl::Bool(value) => (*value).into(),
        Gtmpl::Number(number) => number.as_i64().into(),
        Gtmpl::String(text) => text.as_str().into(),
        Gtmpl::Array(list) => list.iter().map(from_gtmpl).collect(),
        Gtmpl::Object(map) | Gtmpl::Map(map) => map
            .iter()
            .map(|(key, value)| (key.clone(), from_gtmpl(value)))
            .collect(),
        _ => Value::Null,
    }
}

/// What kustomize makes of a folder, without the namespace, which Helm makes.
fn wanted(overlay: &str) -> Objects {
    let mut objects =
        by_name(kustomize::render(&deployment::folder().join(overlay)).unwrap()).unwrap();
    objects.remove("Namespace/microshield").unwrap();
    objects
}

fn assert_same(one: &Objects, other: &Objects) {
    let names = |objects: &Objects| objects.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(one), names(other));
    for (name, object) in one {
        let differences = differences(object, &other[name]);
        assert!(differences.is_empty(), "{name}: {differences:#?}");
    }
}

/// Helm's names of the features.
fn switched_on(feature: &str) -> Value {
    let mut values = values();
    let (first, second) = feature.split_once('-').unwrap_or((feature, ""));
    let mut key = first.to_owned();
    for (at, letter) in second.chars().enumerate() {
        key.push(if at == 0 {
            letter.to_ascii_uppercase()
        } else {
            letter
        });
    }
    let switch = values[&key]["enabled"].take();
    assert_eq!(switch, Value::Bool(false), "{key}");
    values[&key]["enabled"] = true.into();
    values
}

#[test]
fn with_default_values_it_is_the_deployment() {
    assert_same(&render(&values()), &wanted("."));
}

#[test]
fn with_each_switch_it_is_the_overlay() {
    for feature in FEATURES {
        assert_same(
            &render(&switched_on(feature)),
            &wanted(&format!("overlays/{feature}")),
        );
    }
}

#[test]
fn values_get_where_they_belong() {
    let mut values = values();
    let wanted = json!({"limits": {"memory": "2Gi"}});
    for part in ["agent", "generator"] {
        values[part]["image"] = json!({"repository": "registry.test/x", "tag": "1.2.3"});
        values[part]["resources"] = wanted.clone();
        values[part]["extraArgs"] = json!(["--log=debug", "--log=trace"]);
        values[part]["nodeSelector"] = json!({"disk": "ssd"});
    }
    values["agent"]["tolerations"] = json!([{"key": "a", "operator": "Exists"}]);
    values["generator"]["storage"] = json!({"size": "9Gi", "className": "fast"});
    values["imagePullSecrets"] = json!([{"name": "pull"}]);
    let objects = render(&values);
    for name in [
        "DaemonSet/microshield-agent",
        "Deployment/microshield-generator",
    ] {
        let pod = &objects[name]["spec"]["template"]["spec"];
        let container = &pod["containers"][0];
        assert_eq!(container["image"], "registry.test/x:1.2.3");
        assert_eq!(container["resources"], wanted);
        let args = container["args"].as_array().unwrap();
        assert_eq!(args[args.len() - 2..], ["--log=debug", "--log=trace"]);
        assert_eq!(pod["nodeSelector"], json!({"disk": "ssd"}));
        assert_eq!(pod["imagePullSecrets"], json!([{"name": "pull"}]));
    }
    let agents = &objects["DaemonSet/microshield-agent"]["spec"]["template"]["spec"];
    assert_eq!(agents["tolerations"], values["agent"]["tolerations"]);
    let claim = &objects["PersistentVolumeClaim/microshield-generator"]["spec"];
    assert_eq!(claim["storageClassName"], "fast");
    assert_eq!(claim["resources"]["requests"]["storage"], "9Gi");
}

#[test]
fn the_chart_has_this_version_and_a_schema_for_every_value() {
    let text = fs::read_to_string(folder().join("Chart.yaml")).unwrap();
    let chart: Value = serde_yaml::from_str(&text).unwrap();
    assert_eq!(chart["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
    let values = values();
    for part in ["agent", "generator"] {
        assert_eq!(values[part]["image"]["tag"], env!("CARGO_PKG_VERSION"));
    }
    let text = fs::read_to_string(folder().join("values.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&text).unwrap();
    for (key, value) in values.as_object().unwrap() {
        let known = &schema["properties"][key];
        assert!(known.is_object(), "{key}");
        let Some(properties) = known["properties"].as_object() else {
            continue;
        };
        for key in value.as_object().unwrap().keys() {
            assert!(properties.contains_key(key), "{key}");
        }
    }
}
