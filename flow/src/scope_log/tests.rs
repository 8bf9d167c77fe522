use super::*;

const ACCEPT: &str = "<probe> INFO: 2022/08/18 03:24:11.696728 [CONN] [eBPF] \
                      {node-1|841375817545|2|Accept|10556|app|10.0.1.112|10.0.1.224|80|59650|0|0}";
const TRACKED: &str = "<probe> INFO: 2022/08/18 03:24:12.5 [CONN] [conntrack] \
                       {node-1|UPDATE|ESTABLISHED|10.0.1.7|40000|10.96.0.12|80|10.0.0.9|8079|10.0.1.7|40000|77}";

fn parse(line: &str) -> Result<Option<Connection<'_>>, Problem> {
    Parser::new(Ends::Servers).parse(line.as_bytes())
}

#[test]
fn an_accepted_connection_was_opened_by_the_remote_end() {
    let expected = Connection {
        time: Timestamp::from_nanos(1_660_793_051_696_728_000),
        hostname: "node-1",
        client: "10.0.1.224:59650".parse().unwrap(),
        server: "10.0.1.112:80".parse().unwrap(),
        seen: Seen::Accepted(Socket {
            pid: 10556,
            comm: "app",
            timestamp: b"841375817545",
            fd: b"0",
        }),
    };
    assert_eq!(parse(ACCEPT), Ok(Some(expected)));
    // As `kubectl logs --prefix` prints it.
    let prefixed = format!("[pod/weave-scope-agent-nf4gv/agent] {ACCEPT}\r\n");
    assert_eq!(parse(&prefixed), Ok(Some(expected)));
}

#[test]
fn a_thread_may_have_any_name() {
    for name in ["a|b", "|", "}", "x} [CONN] [", ""] {
        let line = ACCEPT.replace("|app|", &format!("|{name}|"));
        let connection = parse(&line).unwrap().unwrap();
        assert!(
            matches!(connection.seen, Seen::Accepted(socket) if socket.comm == name),
            "{connection:?}"
        );
    }
}

#[test]
fn answers_tell_which_server_is_behind_a_service() {
    let expected = Connection {
        time: Timestamp::from_nanos(1_660_793_052_500_000_000),
        hostname: "node-1",
        client: "10.0.1.7:40000".parse().unwrap(),
        server: "10.0.0.9:8079".parse().unwrap(),
        seen: Seen::Tracked {
            called: "10.96.0.12:80".parse().unwrap(),
            masked: "10.0.1.7:40000".parse().unwrap(),
        },
    };
    assert_eq!(parse(TRACKED), Ok(Some(expected)));
}

#[test]
fn lines_of_no_new_connection_are_passed_over() {
    for line in [
        "",
        "<probe> INFO: 2022/08/18 03:24:11.696356 publishing to: 10.0.0.1:4040",
        &ACCEPT.replace("Accept", "Connect"),
        &ACCEPT.replace("Accept", "Close"),
        &TRACKED.replace("ESTABLISHED", "SYN_SENT"),
        &TRACKED.replace("UPDATE", "DESTROY"),
    ] {
        assert_eq!(parse(line), Ok(None), "{line}");
    }
}

#[test]
fn what_is_wrong_is_named_with_its_place() {
    for (line, part, replacement, field, message) in [
        (
            ACCEPT,
            "|80|",
            "|eighty|",
            "SrcPort",
            "`eighty` is not a port",
        ),
        (
            ACCEPT,
            "|80|",
            "|0|",
            "SrcPort",
            "`0` is not the port of a server",
        ),
        (
            ACCEPT,
            "|59650|",
            "|99999|",
            "DstPort",
            "`99999` is not a port",
        ),
        (ACCEPT, "|59650|", "||", "DstPort", "`` is not a port"),
        (
            ACCEPT,
            "10.0.1.112",
            "10.0.1",
            "Src",
            "`10.0.1` is not an address",
        ),
        (
            ACCEPT,
            "10.0.1.224",
            "::g",
            "Dst",
            "`::g` is not an address",
        ),
        (ACCEPT, "10556", "-1", "pid", "`-1` is not a process id"),
        (
            ACCEPT,
            "10556",
            "4294967296",
            "pid",
            "`4294967296` is not a process id",
        ),
        (
            ACCEPT,
            "Accept",
            "Excuse",
            "event",
            "`Excuse` is not Accept, Connect or Close",
        ),
        (
            ACCEPT,
            "2022/08/18",
            "2022/02/30",
            "time",
            "`2022/02/30 03:24:11.696728` is not YYYY/MM/DD hh:mm:ss with a fraction",
        ),
        (
            ACCEPT,
            "11.696728",
            "11,696728",
            "time",
            "`2022/08/18 03:24:11,696728` is not YYYY/MM/DD hh:mm:ss with a fraction",
        ),
        (
            ACCEPT,
            "2022",
            "2922",
            "time",
            "`2922/08/18 03:24:11.696728` is not YYYY/MM/DD hh:mm:ss with a fraction",
        ),
        (
            ACCEPT,
            "2022/08/18 03:24:11",
            "\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            "time",
            "`\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0.696728` is not YYYY/MM/DD hh:mm:ss with a fraction",
        ),
        (
            ACCEPT,
            "2022",
            "1922",
            "time",
            "`1922/08/18 03:24:11.696728` is not YYYY/MM/DD hh:mm:ss with a fraction",
        ),
        (
            ACCEPT,
            "2022",
            "22",
            "time",
            "`22/08/18 03:24:11.696728` is not YYYY/MM/DD hh:mm:ss with a fraction",
        ),
        (ACCEPT, "|0|0}", "}", ".", "less than 12 fields"),
        (
            ACCEPT,
            "|0|0}",
            "|0|0",
            ".",
            "the line ends before the record does",
        ),
        (
            ACCEPT,
            "eBPF",
            "ebpf",
            ".",
            "neither `[eBPF] {` nor `[conntrack] {` after `[CONN]`",
        ),
        (
            TRACKED,
            "10.0.0.9",
            "nine",
            "Reply.Src",
            "`nine` is not an address",
        ),
        (
            TRACKED,
            "|80|",
            "|80x|",
            "Orig.DstPort",
            "`80x` is not a port",
        ),
        (
            TRACKED,
            "|8079|",
            "|0|",
            "Reply.SrcPort",
            "`0` is not the port of a server",
        ),
        (TRACKED, "|77}", "}", ".", "less than 12 fields"),
    ] {
        let broken = line.replacen(part, replacement, 1);
        assert_ne!(broken, line);
        let problem = parse(&broken).unwrap_err();
        assert_eq!((problem.field, problem.message.as_str()), (field, message));
        if field != "." {
            let value = message.split('`').nth(1).unwrap();
            assert!(broken[problem.offset..].starts_with(value), "{problem:?}");
        }
    }
}

#[test]
fn a_line_cut_anywhere_is_refused_or_tells_of_nothing() {
    for line in [ACCEPT, TRACKED] {
        for end in 0..line.len() {
            let cut = &line[..end];
            match parse(cut) {
                Ok(None) => assert!(!cut.contains(" [CONN] ["), "{end}"),
                Ok(Some(connection)) => panic!("{connection:?}"),
                Err(problem) => assert_eq!(problem.field, "."),
            }
            let at_the_end = Parser::new(Ends::Servers).parse_unended(cut.as_bytes());
            assert_eq!(at_the_end.is_err(), end >= "<probe>".len(), "{end}");
        }
    }
}

#[test]
fn the_kept_second_is_not_mistaken_for_another() {
    let mut parser = Parser::new(Ends::Servers);
    let later = ACCEPT.replace("03:24:11", "03:24:12");
    let mut seconds = |line: &str| {
        let connection = parser.parse(line.as_bytes()).unwrap().unwrap();
        connection.time.as_nanos() / 1_000_000_000
    };
    let times = [ACCEPT, &later, ACCEPT, ACCEPT].map(&mut seconds);
    assert_eq!(
        times,
        [1_660_793_051, 1_660_793_052, 1_660_793_051, 1_660_793_051]
    );
    let broken = ACCEPT.replace("03:24:11", "03:61:11");
    assert!(parser.parse(broken.as_bytes()).is_err());
    assert!(parser.parse(broken.as_bytes()).is_err());
}

#[test]
fn a_connection_that_is_made_is_seen_at_its_client() {
    let line = ACCEPT
        .replace("Accept", "Connect")
        .replace("|0|0}", "|0|17}");
    assert_eq!(parse(&line), Ok(None));
    let connection = Parser::new(Ends::Both).parse(line.as_bytes());
    let connection = connection.unwrap().unwrap();
    assert_eq!(connection.client, "10.0.1.112:80".parse().unwrap());
    assert_eq!(connection.server, "10.0.1.224:59650".parse().unwrap());
    let Seen::Connected(socket) = connection.seen else {
        panic!("{connection:?}");
    };
    assert_eq!(socket.kernel_ns(), Some(841_375_817_545));
    assert_eq!(socket.fd(), Some(17));
}

#[test]
fn what_the_probe_does_not_know_is_absent() {
    let line = ACCEPT.replace("841375817545", "0");
    let connection = parse(&line).unwrap().unwrap();
    let Seen::Accepted(socket) = connection.seen else {
        panic!("{connection:?}");
    };
    assert_eq!((socket.kernel_ns(), socket.fd()), (None, None));
}
