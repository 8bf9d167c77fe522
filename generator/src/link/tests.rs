use std::{collections::BTreeSet, fs, io::Read, path::PathBuf};

use flow::{
    endpoint::Endpoint,
    record::{Direction, FlowRecord},
    time::Timestamp,
    topology::{Objects, file, scope},
};
use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::{
    flows::MAX_LINE_BYTES,
    ledger::Ledger,
    policy::{self, Granularity, Namespaces},
    samples::synthesise,
};

fn fixture(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("../tests/fixtures/microshield").join(name)
}

fn log() -> String {
    fs::read_to_string(fixture("flows.log")).unwrap()
}

fn topology(objects: Objects) -> Topology {
    Topology::new(objects, Timestamp::from_nanos(1_700_000_000_000_000_000))
}

fn report() -> Topology {
    topology(scope::load(&fixture("report.json")).unwrap().objects)
}

fn cluster() -> Topology {
    topology(file::load(&fixture("cluster.yaml")).unwrap().objects)
}

fn options(threads: usize) -> Options {
    Options {
        on_bad_line: OnBadLine::Refuse,
        external: false,
        threads: NonZeroUsize::new(threads).unwrap(),
    }
}

fn run(
    log: impl Read,
    topology: &Topology,
    options: Options,
) -> Result<(String, Summary), LinkError> {
    let mut records = Vec::new();
    let input = Input::File("probe.log".into());
    let summary = pipeline::run(log, &input, topology, options, &mut records)?;
    Ok((String::from_utf8(records).unwrap(), summary))
}

fn linked(log: &str, topology: &Topology) -> (String, Summary) {
    run(log.as_bytes(), topology, options(1)).unwrap()
}

fn parsed(records: &str) -> Vec<FlowRecord> {
    let records = records.lines();
    records
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// Hands out as many bytes at once as it is told, in turn.
struct InPieces<'a> {
    rest: &'a [u8],
    sizes: std::iter::Cycle<std::vec::IntoIter<usize>>,
}

impl<'a> InPieces<'a> {
    fn new(text: &'a str, sizes: Vec<usize>) -> Self {
        Self {
            rest: text.as_bytes(),
            sizes: sizes.into_iter().cycle(),
        }
    }
}

impl Read for InPieces<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let size = self.sizes.next().unwrap().min(buffer.len());
        (&mut self.rest).take(size as u64).read(buffer)
    }
}

/// Whether these keys stand in the text one after the other.
fn stand_in_order(text: &str, keys: &[&str]) -> bool {
    let rest = keys.iter().try_fold(text, |rest, key| {
        let (_, rest) = rest.split_once(&format!("\"{key}\":"))?;
        Some(rest)
    });
    rest.is_some()
}

/// MicroShield's `generator.py` reads `src` and `dst` with `service` (whose `id`, `name`, `namespace` and `selector` it needs
/// unless the service is empty) and all of `tuple`.
#[test]
fn records_are_those_of_microshield_but_for_addresses_that_are_nodes() {
    let golden = fs::read_to_string(fixture("linked.json")).unwrap();
    let (ours, summary) = linked(&log(), &report());
    assert_eq!((summary.lines, summary.records), (4801, 725));
    assert_eq!((summary.outside, summary.skipped), (97, 0));
    assert_eq!(ours.lines().count(), golden.lines().count());
    for (ours, theirs) in ours.lines().zip(golden.lines()) {
        for keys in [
            ["timestamp", "hostname", "tuple", "src", "dst"].as_slice(),
            &["src_addr", "src_port", "dst_addr", "dst_port"],
        ] {
            assert!(stand_in_order(ours, keys), "{ours}");
        }
        let (ours, theirs): (Value, Value) = (
            serde_json::from_str(ours).unwrap(),
            serde_json::from_str(theirs).unwrap(),
        );
        for field in ["timestamp", "hostname", "tuple"] {
            assert_eq!(ours[field], theirs[field]);
        }
        for (end, address) in [("src", "src_addr"), ("dst", "dst_addr")] {
            let (our_end, their_end) = (&ours[end], &theirs[end]);
            if ours["tuple"][address] == "192.168.218.133" {
                // Of the API server and of etcd, which are on their node's network.
                assert_eq!(their_end["pod"]["name"], "etcd-master");
                assert_eq!(our_end["node"]["addresses"][0], "192.168.218.133");
                assert_eq!(our_end["pod"], serde_json::json!({}));
                continue;
            }
            assert_eq!(our_end["service"], their_end["service"]);
            for (field, value) in their_end["pod"].as_object().unwrap() {
                assert_eq!(our_end["pod"][field], *value);
            }
        }
    }
    let sample = ours
        .lines()
        .find(|line| line.contains("\"selector\""))
        .unwrap();
    let service = &sample[sample.rfind("\"service\":{\"").unwrap()..];
    assert!(
        stand_in_order(service, &["id", "labels", "namespace", "name", "selector"]),
        "{service}"
    );
}

/// Defect: addresses of pods in their node's network and of the CNI's own interface were taken for `weave-scope-agent`.
#[test]
fn addresses_of_nodes_are_not_taken_for_a_pod() {
    let (records, _) = linked(&log(), &cluster());
    let mut nodes = BTreeSet::new();
    for record in parsed(&records) {
        for (end, address) in [
            (&record.src, record.tuple.src_addr),
            (&record.dst, record.tuple.dst_addr),
        ] {
            assert!(!end.to_string().contains("weave-scope-agent"), "{record:?}");
            if let Endpoint::Node(node) = end {
                nodes.insert(format!("{address} {}", node.name));
            }
        }
    }
    assert_eq!(
        nodes.into_iter().collect::<Vec<_>>(),
        [
            "10.0.1.224 node-1",
            "10.0.1.87 node-1",
            "10.0.2.187 master",
            "192.168.218.133 master",
            "192.168.218.134 node-1",
            "192.168.218.135 node-2",
        ]
    );
}

/// Defect: ports carried no protocol. Defect: the last lines were lost.
#[test]
fn protocol_and_process_are_written_and_no_line_is_lost() {
    let log = log();
    let last_accept = log.lines().filter(|line| line.contains("|Accept|")).count();
    let (records, summary) = run(
        log.trim_end().as_bytes(),
        &cluster(),
        Options {
            external: true,
            ..options(2)
        },
    )
    .unwrap();
    let loopback = log
        .lines()
        .filter(|line| line.contains("|Accept|") && line.contains("|127.0.0.1|"))
        .count();
    let records = parsed(&records);
    assert_eq!(summary.records, records.len() as u64);
    let accepted = |record: &&FlowRecord| record.direction == Direction::Ingress;
    assert_eq!(
        records.iter().filter(accepted).count(),
        last_accept - loopback
    );
    let first = records[0].clone();
    assert_eq!(first.protocol, flow::record::Protocol::Tcp);
    assert_eq!(first.direction, Direction::Ingress);
    let process = first.process.unwrap();
    assert_eq!((process.pid, process.comm.as_str()), (10556, "app"));
}

fn policies(records: &str, namespace: &str, granularity: Granularity) -> Vec<String> {
    let mut ledger = Ledger::default();
    for record in parsed(records) {
        ledger.observe(record);
    }
    let options = policy::Options {
        granularity,
        ..policy::Options::new(Namespaces::Only([namespace.to_owned()].into()))
    };
    let files = synthesise(&ledger.edges(), &options).files;
    files.into_values().collect()
}

#[test]
fn the_same_policies_come_of_our_records() {
    let golden = fs::read_to_string(fixture("linked.json")).unwrap();
    let (ours, _) = linked(&log(), &report());
    for namespace in ["default", "sock-shop"] {
        for granularity in [Granularity::Service, Granularity::Namespace] {
            let made = policies(&ours, namespace, granularity);
            assert_eq!(made, policies(&golden, namespace, granularity));
        }
    }
    let (of_cluster, _) = linked(&log(), &cluster());
    let made = policies(&of_cluster, "sock-shop", Granularity::Service);
    assert_eq!(made.len(), 8);
    assert!(made.iter().all(|text| !text.contains("weave-scope-agent")));
}

/// `render` writes what the record itself would give.
#[test]
fn a_line_is_what_the_record_gives() {
    let mut log = log();
    log.push_str(
        "<probe> INFO: 2022/08/18 03:24:12.000000 [CONN] [eBPF] \
         {node \"1\"|1|2|Accept|1|a\"\\\tb|10.0.1.112|203.0.113.7|80|1|0|0}\n\
         <probe> INFO: 2022/08/18 03:24:12.120 [CONN] [conntrack] \
         {node-1|UPDATE|ESTABLISHED|10.0.1.167|1|10.96.0.13|80|10.0.0.99|80|10.0.1.167|1|7}\n\
         <probe> INFO: 2022/08/18 03:24:12 [CONN] [eBPF] {n|1|2|Accept|1|x|10.0.1.112|2001:db8::1|80|1|0|0}\n",
    );
    for topology in [report(), cluster()] {
        let options = Options {
            external: true,
            ..options(1)
        };
        let (records, summary) = run(log.as_bytes(), &topology, options).unwrap();
        assert_eq!(records.lines().count() as u64, summary.records);
        for line in records.lines() {
            let record: FlowRecord = serde_json::from_str(line).unwrap();
            assert_eq!(serde_json::to_string(&record).unwrap(), line);
        }
    }
}

#[test]
fn what_is_made_to_somebody_outside_is_seen_at_the_client_only() {
    let line = |event: &str, local: &str, remote: &str, ports: &str| {
        format!(
            "<probe> INFO: 2022/08/18 03:24:12.5 [CONN] [eBPF] \
             {{node-1|841375817545|2|{event}|10556|app|{local}|{remote}|{ports}|0|0}}\n"
        )
    };
    let log = [
        line("Connect", "10.0.1.167", "203.0.113.9", "40000|443"),
        line("Connect", "10.0.1.167", "10.0.0.99", "40001|8079"),
        line("Accept", "10.0.0.99", "10.0.1.167", "8079|40001"),
        line("Connect", "10.0.1.167", "10.96.0.13", "40002|80"),
        line("Connect", "198.51.100.7", "203.0.113.9", "40003|443"),
    ]
    .concat();
    let options = Options {
        external: true,
        ..options(1)
    };
    let (records, summary) = run(log.as_bytes(), &cluster(), options).unwrap();
    assert_eq!((summary.records, summary.outside), (2, 0));
    let [out, within] = parsed(&records).try_into().unwrap();
    assert_eq!(
        (out.direction, out.tuple.dst_port),
        (Direction::Egress, 443)
    );
    assert_eq!(out.dst, Endpoint::External("203.0.113.9".parse().unwrap()));
    assert_eq!(
        (within.direction, within.tuple.dst_port),
        (Direction::Ingress, 8079)
    );
    let (_, summary) = linked(&log, &cluster());
    assert_eq!((summary.records, summary.outside), (1, 0));
}

#[test]
fn a_call_of_a_service_is_translated_to_the_backend_that_answered() {
    let line = |host: &str, client: &str, called: &str| {
        format!(
            "<probe> INFO: 2022/08/18 03:24:12.5 [CONN] [conntrack] \
             {{{host}|UPDATE|ESTABLISHED|{client}|40000|{called}|10.0.0.99|8079|{client}|40000|7}}\n"
        )
    };
    // `carts` listens on 80, and is called here as if it listened on 8079.
    let log = [
        line("node-1", "10.0.1.167", "10.96.0.13|80"),
        line("node-2", "10.0.1.167", "10.0.0.99|8079"),
        line("node-1", "10.0.1.167", "10.0.0.99|8079"),
    ]
    .concat();
    let (records, _) = linked(&log, &cluster());
    let seen: Vec<String> = parsed(&records)
        .iter()
        .map(|record| {
            format!(
                "{:?} {} -> {} {}:{} via {:?}",
                record.direction,
                record.src,
                record.dst,
                record.tuple.dst_addr,
                record.tuple.dst_port,
                record.via.map(|via| via.to_string()),
            )
        })
        .collect();
    let ends = "sock-shop/front-end-6585d48b5c-hm4kj -> sock-shop/carts-76dd6bf8f9-pvjjh";
    assert_eq!(
        seen,
        [
            format!("Egress {ends} 10.96.0.13:8079 via Some(\"10.96.0.13:80\")"),
            format!("Ingress {ends} 10.0.0.99:8079 via None"),
            format!("Egress {ends} 10.0.0.99:8079 via None"),
        ]
    );
    let mut ledger = Ledger::default();
    for record in parsed(&records) {
        ledger.observe(record);
    }
    let edges = ledger.edges();
    assert_eq!(edges.len(), 1, "{edges:?}");
    assert_eq!((edges[0].seen_by_client, edges[0].seen_by_server), (2, 1));
    assert_eq!(edges[0].server_address.to_string(), "10.0.0.99");
}

#[test]
fn a_tracked_connection_with_nobody_known_was_seen_at_the_known_end() {
    let mut objects = file::load(&fixture("cluster.yaml")).unwrap().objects;
    for pod in &mut objects.pods {
        pod.identity.node = None;
    }
    let line = |client: &str, server: &str| {
        format!(
            "<probe> INFO: 2022/08/18 03:24:12.5 [CONN] [conntrack] \
             {{node-1|UPDATE|ESTABLISHED|{client}|40000|{server}|{server}|{client}|40000|7}}\n"
        )
    };
    let log = [
        line("203.0.113.7", "10.0.1.112|80"),
        line("10.0.1.112", "203.0.113.8|443"),
    ]
    .concat();
    let options = Options {
        external: true,
        ..options(1)
    };
    let (records, _) = run(log.as_bytes(), &topology(objects), options).unwrap();
    let directions: Vec<Direction> = parsed(&records)
        .iter()
        .map(|record| record.direction)
        .collect();
    assert_eq!(directions, [Direction::Ingress, Direction::Egress]);
    // Hand-made records do not say it.
    let silent = records.replace(r#""direction":"ingress","#, "");
    let silent = silent.replace(r#""direction":"egress","#, "");
    for records in [records, silent] {
        let made = policies(&records, "sock-shop", Granularity::Service).concat();
        for address in ["203.0.113.7/32", "203.0.113.8/32"] {
            assert!(made.contains(address), "{made}");
        }
    }
}

#[test]
fn an_address_is_whose_it_was_then() {
    let mut objects = file::load(&fixture("cluster.yaml")).unwrap().objects;
    let of_catalogue = |pod: &flow::topology::Pod| pod.identity.name.starts_with("catalogue-5");
    let mut later = objects
        .pods
        .iter()
        .find(|pod| of_catalogue(pod))
        .unwrap()
        .clone();
    later.identity.uid = "later".to_owned();
    later.identity.name = "later".to_owned();
    // 2022-08-18 03:24:20.
    later.started = Some(Timestamp::from_nanos(1_660_793_060_000_000_000));
    objects.pods.push(later);
    let line = |second| {
        format!(
            "<probe> INFO: 2022/08/18 03:24:{second}.0 [CONN] [eBPF] \
             {{node-1|1|2|Accept|1|app|10.0.1.112|10.0.1.167|80|1|0|0}}\n"
        )
    };
    let log = ["19", "20", "14", "59"].map(line).concat();
    let (records, _) = linked(&log, &topology(objects));
    let servers: Vec<String> = parsed(&records)
        .iter()
        .map(|record| record.dst.to_string())
        .collect();
    let earlier = "sock-shop/catalogue-5f495f9cf8-68w5j";
    let later = "sock-shop/later";
    assert_eq!(servers, [earlier, later, earlier, later]);
}

#[test]
fn a_malformed_line_is_named_or_counted() {
    type Change = fn(&str) -> String;

    let topology = report();
    let lines: Vec<String> = log().lines().take(40).map(str::to_owned).collect();
    let broken = |line: usize, change: Change| {
        let mut lines = lines.clone();
        lines[line - 1] = change(&lines[line - 1]);
        lines.join("\n") + "\n"
    };
    let cases: [(usize, Change, &str); 4] = [
        (
            7,
            |line| line.replace("eBPF", "bpf"),
            "probe.log: line 7, column 1: neither",
        ),
        (
            5,
            |line| line.replace("|80|", "|http|"),
            "probe.log: line 5, column 118: field `SrcPort`: `http` is not a port",
        ),
        (
            40,
            |line| line[..line.len() - 9].to_owned(),
            "probe.log: line 40, column 1: the line ends",
        ),
        (
            9,
            |line| format!("{line}{}", " ".repeat(MAX_LINE_BYTES)),
            "probe.log: line 9: longer than 1048576 bytes",
        ),
    ];
    let (good, _) = linked(&(lines.join("\n") + "\n"), &topology);
    for threads in [1, 3] {
        for (line, change, expected) in &cases {
            let log = broken(*line, *change);
            let error = run(log.as_bytes(), &topology, options(threads))
                .unwrap_err()
                .to_string();
            assert!(error.starts_with(expected), "{error}");
            let options = Options {
                on_bad_line: OnBadLine::Skip,
                ..options(threads)
            };
            let (records, summary) = run(log.as_bytes(), &topology, options).unwrap();
            assert_eq!((summary.lines, summary.skipped), (40, 1));
            assert_eq!(summary.problems[0].to_string(), error);
            assert!(records.lines().all(|line| good.contains(line)));
        }
    }
}

#[test]
fn an_endless_line_is_not_held_in_memory() {
    let topology = report();
    let endless = || io::repeat(b'x').take(1 << 30);
    let error = run(endless(), &topology, options(2)).unwrap_err();
    assert!(matches!(
        error,
        LinkError::Log(FlowsError::TooLong { line: 1, .. })
    ));
    let options = Options {
        on_bad_line: OnBadLine::Skip,
        ..options(2)
    };
    let log = log();
    let (records, summary) = run(
        endless().chain(&b"\n"[..]).chain(log.as_bytes()),
        &topology,
        options,
    )
    .unwrap();
    assert_eq!((summary.lines, summary.skipped), (4802, 1));
    assert_eq!(records, linked(&log, &topology).0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    #[test]
    fn records_keep_the_order_of_lines_however_the_log_is_cut(
        sizes in prop::collection::vec(1..200_000_usize, 1..5),
        threads in 1..5_usize,
        times in 1..4_usize,
    ) {
        let topology = report();
        let log = log().repeat(times);
        let (records, summary) = run(InPieces::new(&log, sizes), &topology, options(threads)).unwrap();
        prop_assert_eq!(summary.lines, 4801 * times as u64);
        let (expected, _) = linked(&log, &topology);
        prop_assert!(records == expected);
    }
}
