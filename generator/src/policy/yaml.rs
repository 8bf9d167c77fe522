//! YAML that every reader takes for the same.
//!
//! `kubectl` reads YAML 1.1, where a plain `yes`, `on` or `1_000` is no string; the serialisers for Rust write YAML 1.2,
//! where it is, and the API server would refuse the file. Here all that could be mistaken stands in quotes.

use serde_json::Value;

/// Plain words that are a boolean, a null or a number in some version of YAML, in lower case.
const WORDS: [&str; 11] = [
    "false", "inf", "n", "nan", "no", "null", "off", "on", "true", "y", "yes",
];

/// The value in block style, keys sorted, sequences as far left as their key, as `kubectl get -o yaml` writes.
pub(super) fn to_yaml(value: &Value) -> String {
    let mut yaml = String::new();
    block(&mut yaml, value, 0, false);
    yaml
}

/// Writes a value whose first line begins where the text ends. `inline`: the first line stands after `- `.
fn block(yaml: &mut String, value: &Value, indent: usize, inline: bool) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            let mut fields: Vec<(&String, &Value)> = fields.iter().collect();
            fields.sort_by_key(|(key, _)| *key);
            for (index, (key, value)) in fields.into_iter().enumerate() {
                if index > 0 || !inline {
                    pad(yaml, indent);
                }
                string(yaml, key);
                yaml.push(':');
                match value {
                    Value::Object(fields) if !fields.is_empty() => {
                        yaml.push('\n');
                        block(yaml, value, indent + 2, false);
                    }
                    Value::Array(items) if !items.is_empty() => {
                        yaml.push('\n');
                        block(yaml, value, indent, false);
                    }
                    _ => {
                        yaml.push(' ');
                        block(yaml, value, indent, true);
                    }
                }
            }
        }
        Value::Array(items) if !items.is_empty() => {
            for (index, item) in items.iter().enumerate() {
                if index > 0 || !inline {
                    pad(yaml, indent);
                }
                yaml.push_str("- ");
                block(yaml, item, indent + 2, true);
            }
        }
        scalar => {
            match scalar {
                Value::String(text) => string(yaml, text),
                // In JSON's form, which is YAML's as well: numbers, `true`, `null`, and what is empty: `{}`, `[]`.
                other => yaml.push_str(&other.to_string()),
            }
            yaml.push('\n');
        }
    }
}

fn pad(yaml: &mut String, indent: usize) {
    yaml.extend(std::iter::repeat_n(' ', indent));
}

fn string(yaml: &mut String, text: &str) {
    if is_plain(text) {
        yaml.push_str(text);
        return;
    }
    yaml.push('"');
    for c in text.chars() {
        match (c, u32::from(c)) {
            ('"' | '\\', _) => yaml.extend(['\\', c]),
            (' '..='~', _) => yaml.push(c),
            (_, code @ ..=0xffff) => yaml.push_str(&format!("\\u{code:04x}")),
            (_, code) => yaml.push_str(&format!("\\U{code:08x}")),
        }
    }
    yaml.push('"');
}

/// No number starts with a letter, and no character of these has a meaning after one.
fn is_plain(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c))
        && !WORDS.contains(&text.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn blocks_are_laid_out_as_kubectl_does() {
        let value = json!({
            "b": [{"port": 53, "on": "UDP"}, [1, 2], [], "x"],
            "a": {"empty": {}, "none": null, "true": true, "c": {"d": "e.f/g"}},
        });
        let expected = r#"a:
  c:
    d: e.f/g
  empty: {}
  none: null
  "true": true
b:
- "on": UDP
  port: 53
- - 1
  - 2
- []
- x
"#;
        assert_eq!(to_yaml(&value), expected);
    }

    #[test]
    fn what_any_version_of_yaml_mistakes_stands_in_quotes() {
        for text in [
            "yes",
            "No",
            "ON",
            "off",
            "y",
            "N",
            "True",
            "NULL",
            "",
            "1",
            "1.0",
            "1_000",
            "0x1f",
            "0X1F",
            "012",
            "0o17",
            "0b11",
            "1e3",
            "12:30",
            "2001-01-01",
            "~",
            "<<",
            "=",
            "-",
            "- a",
            "a: b",
            "a #b",
            "&a",
            "*a",
            "!a",
            "|",
            ">",
            "%a",
            "@a",
            "`a",
            "'a'",
            ".inf",
            ".NaN",
            "10.0.0.1/32",
            "a\nb",
            "a\u{85}b",
            "ä",
            "\u{1f980}",
            "\"\\",
        ] {
            let yaml = to_yaml(&json!(text));
            assert!(yaml.starts_with('"') && yaml.ends_with("\"\n"), "{yaml}");
            assert_eq!(serde_yaml::from_str::<String>(&yaml).unwrap(), text);
        }
        for text in [
            "UDP",
            "app",
            "weave-scope",
            "My_App.v2",
            "kubernetes.io/metadata.name",
            "nginx",
        ] {
            assert_eq!(to_yaml(&json!(text)), format!("{text}\n"));
        }
    }

    fn any_value() -> impl Strategy<Value = Value> {
        let scalar = prop_oneof![
            any::<String>().prop_map(Value::from),
            "[a-z0-9._:-]{0,6}".prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            any::<bool>().prop_map(Value::from),
            Just(Value::Null),
        ];
        scalar.prop_recursive(4, 40, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::hash_map("[ -~]{0,8}", inner, 0..5)
                    .prop_map(|fields| fields.into_iter().collect()),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(value in any_value()) {
            let yaml = to_yaml(&value);
            let read: Value = serde_yaml::from_str(&yaml).map_err(|error| {
                TestCaseError::fail(format!("{error}:\n{yaml}"))
            })?;
            prop_assert_eq!(read, value);
        }
    }
}
