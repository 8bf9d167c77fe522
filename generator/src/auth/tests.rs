use std::net::Ipv4Addr;

use super::*;

const OUTSIDE: &str = "0.0.0.0:8765";
const LOOPBACK: &str = "[::1]:8765";
const PEER: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

fn file(tokens: &str) -> (tempfile::NamedTempFile, TokenFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), tokens).unwrap();
    let tokens = file.path().to_str().unwrap().parse().unwrap();
    (file, tokens)
}

fn secret(token: &str) -> Secret {
    Secret::new(token.to_owned())
}

async fn gate(rules: &Rules, listen: &str) -> Result<Gate, RulesError> {
    rules.clone().gate(listen.parse().unwrap()).await
}

#[tokio::test]
async fn nothing_is_open_to_other_machines_unless_that_is_said() {
    let (_file, tokens) = file("agent");
    let nobody = Rules::default();
    let reading = Rules {
        read_tokens: Some(tokens.clone()),
        ..Rules::default()
    };
    for rules in [&nobody, &reading] {
        let refused = gate(rules, OUTSIDE).await;
        assert!(matches!(refused, Err(RulesError::Open(_))), "{refused:?}");
        assert!(gate(rules, LOOPBACK).await.is_ok());
    }
    let insecure = Rules {
        insecure: true,
        ..nobody
    };
    let with_token = Rules {
        tokens: Some(tokens),
        ..Rules::default()
    };
    for rules in [insecure, with_token] {
        assert!(gate(&rules, OUTSIDE).await.is_ok());
    }
}

#[tokio::test]
async fn reporting_and_reading_are_two_permissions() {
    let (agents, tokens) = file("agent\nagent-next");
    let (_readers, read_tokens) = file("reader");
    let rules = Rules {
        tokens: Some(tokens),
        read_tokens: Some(read_tokens),
        ..Rules::default()
    };
    let both = gate(&rules, OUTSIDE).await.unwrap();
    let anybody = Admission::default();
    for (shown, may_report, may_read) in [
        (Some("agent"), Ok(anybody.clone()), Err(Denied::WrongToken)),
        (
            Some("agent-next"),
            Ok(anybody.clone()),
            Err(Denied::WrongToken),
        ),
        (Some("reader"), Err(Denied::WrongToken), Ok(())),
        (
            Some("agen"),
            Err(Denied::WrongToken),
            Err(Denied::WrongToken),
        ),
        (Some(""), Err(Denied::WrongToken), Err(Denied::WrongToken)),
        (None, Err(Denied::NoToken), Err(Denied::NoToken)),
    ] {
        let shown = shown.map(secret);
        assert_eq!(both.agent(shown.as_ref(), PEER).await, may_report);
        assert_eq!(both.reader(shown.as_ref(), PEER).await, may_read);
    }
    // The file is read each time.
    std::fs::write(agents.path(), "another").unwrap();
    assert_eq!(
        both.agent(Some(&secret("agent")), PEER).await,
        Err(Denied::WrongToken)
    );
    assert_eq!(
        both.agent(Some(&secret("another")), PEER).await,
        Ok(anybody)
    );
    agents.close().unwrap();
    assert_eq!(
        both.agent(Some(&secret("another")), PEER).await,
        Err(Denied::Unavailable)
    );
}

#[tokio::test]
async fn who_guards_reporting_does_not_leave_reading_open() {
    let (_file, tokens) = file("agent");
    let rules = Rules {
        tokens: Some(tokens),
        ..Rules::default()
    };
    let gate = gate(&rules, LOOPBACK).await.unwrap();
    assert_eq!(gate.reader(None, PEER).await, Err(Denied::NoReading));
    assert_eq!(
        gate.reader(Some(&secret("agent")), PEER).await,
        Err(Denied::NoReading)
    );
}

/// All agents would be readers.
#[tokio::test]
async fn agents_and_readers_are_two_accounts() {
    let account: Account = "microshield/microshield-agent".parse().unwrap();
    let rules = Rules {
        review: Some(Review {
            access: Access::default(),
            audience: "microshield".to_owned(),
            agents: account.clone(),
            readers: Some(account),
        }),
        ..Rules::default()
    };
    let refused = gate(&rules, LOOPBACK).await;
    assert!(
        matches!(refused, Err(RulesError::OneAccount(_))),
        "{refused:?}"
    );
}

#[test]
fn accounts() {
    let account: Account = "microshield/microshield-agent".parse().unwrap();
    assert_eq!(
        account.to_string(),
        "system:serviceaccount:microshield:microshield-agent"
    );
    for bad in ["", "a", "/a", "a/", "a/b/c"] {
        assert!(bad.parse::<Account>().is_err(), "{bad}");
    }
}
