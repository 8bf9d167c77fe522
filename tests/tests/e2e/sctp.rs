//! SCTP: associations of the kernel's, where it has it, and of stacks in user space, which exchange the same packets through raw
//! sockets.

use std::{collections::BTreeMap, fs, net::SocketAddr, path::Path};

use anyhow::{Context, Result, ensure};
use flow::record::Direction::{self, Egress, Ingress};
use lab::{Agent, AgentOptions, Generator, GeneratorOptions, Hooks, Lab, pace, truth::Edge};

use crate::{
    HOOKS, Test, expect,
    stage::{MAPPED, Stage, V4, V6, address, any, both, cluster, edge, owner, steps},
};

pub(crate) fn tests() -> Vec<Test> {
    let mut tests: Vec<Test> = USER_SPACE
        .into_iter()
        .map(|(name, check)| Test::new(format!("sctp::{name}"), check))
        .collect();
    if !Path::new("/proc/net/sctp").exists() {
        eprintln!("this kernel has no SCTP of its own: `cargo xtask test --vm` tests it on others");
        return tests;
    }
    for hooks in HOOKS {
        for (name, check) in KERNEL {
            let name = format!("sctp::{name}[{hooks}]");
            tests.push(Test::new(name, move || check(hooks)));
        }
    }
    tests
}

type Check = fn() -> Result<()>;

const USER_SPACE: [(&str, Check); 5] = [
    ("in_user_space", in_user_space),
    ("a_policy_allows_what_was_seen", a_policy),
    ("both_call_at_once", both_call_at_once),
    ("what_is_no_association", what_is_no_association),
    ("calls_without_room_are_counted", calls_without_room),
];

/// With a form of the hooks.
type KernelCheck = fn(Hooks) -> Result<()>;

const KERNEL: [(&str, KernelCheck); 4] = [
    ("associations", associations),
    ("what_was_open_before", what_was_open_before),
    ("a_service_address", a_service_address),
    ("whose_sockets", whose_sockets),
];

/// Diameter's port.
const PORT: u16 = 3868;

/// The client's, where it matters.
const FROM: u16 = 40_000;

/// Kinds of chunks (RFC 9260, 3.2; RFC 4895, 4.1).
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const ABORT: u8 = 6;
const COOKIE_ECHO: u8 = 10;
const COOKIE_ACK: u8 = 11;
const AUTH: u8 = 15;

/// The tags that the ends have chosen.
const CLIENT: u32 = 0xc0ff_ee01;
const SERVER: u32 = 0x5e7e_5e7e;

/// A chunk as it is sent.
fn chunk(kind: u8, body: &[u8]) -> Vec<u8> {
    let length = u16::try_from(4 + body.len()).unwrap_or(u16::MAX);
    let mut bytes = vec![kind, 0];
    bytes.extend(length.to_be_bytes());
    bytes.extend(body);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// INIT or INIT ACK of whoever has chosen this tag.
fn init(kind: u8, tag: u32) -> Vec<u8> {
    let streams_and_sequence = [0, 0, 0x10, 0, 0, 1, 0, 1, 0, 0, 0, 1];
    chunk(
        kind,
        &[&tag.to_be_bytes()[..], &streams_and_sequence].concat(),
    )
}

/// A packet in hexadecimal digits. Its checksum is wrong, so that a kernel which has SCTP leaves it to the raw sockets.
fn packet(from: u16, to: u16, tag: u32, chunks: &[u8]) -> String {
    let mut bytes = [from.to_be_bytes(), to.to_be_bytes()].concat();
    bytes.extend(tag.to_be_bytes());
    bytes.extend([0; 4]);
    bytes.extend(chunks);
    digits(&bytes)
}

fn digits(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a client sends, or a server, between these two ports.
fn call(tag: u32, chunks: &[u8]) -> String {
    packet(FROM, PORT, tag, chunks)
}

fn reply(tag: u32, chunks: &[u8]) -> String {
    packet(PORT, FROM, tag, chunks)
}

/// A server that answers one call, and whose last packet is sent twice, as when the first is lost.
fn answers(client: SocketAddr) -> Vec<String> {
    let family = usize::from(client.is_ipv6());
    steps!["sctp-raw s {}", any(family); "ready";
           "recv s"; "packet s {client} {}", reply(CLIENT, &init(INIT_ACK, SERVER));
           "recv s"; "packet s {client} {}", reply(CLIENT, &chunk(COOKIE_ACK, &[]));
           "recv s"; "packet s {client} {}", reply(CLIENT, &chunk(COOKIE_ACK, &[])); "stay"]
    .to_vec()
}

fn calls(server: SocketAddr) -> Vec<String> {
    let family = usize::from(server.is_ipv6());
    let cookie = call(SERVER, &chunk(COOKIE_ECHO, &[7; 40]));
    steps!["sctp-raw c {}", any(family);
           "packet c {server} {}", call(0, &init(INIT, CLIENT)); "recv c";
           "packet c {server} {cookie}"; "recv c"; "packet c {server} {cookie}"; "recv c"]
    .to_vec()
}

/// Stacks such as usrsctp: one association over IPv4 and one over IPv6, each counted once at either end although packets are
/// sent again. One that is called again and again without an answer is one that failed; the answer comes late then.
fn in_user_space() -> Result<()> {
    let mut stage = Stage::new()?;
    for (pod, family) in [("one", V4), ("two", V6)] {
        let client = stage.at("client", family, FROM)?;
        stage.starts(pod, &answers(client))?;
        stage.plays("client", &calls(stage.at(pod, family, PORT)?))?;
    }
    let (client, late) = (stage.at("client", V4, FROM)?, stage.at("three", V4, PORT)?);
    // As RFC 4895 has it: what comes first authenticates the rest.
    let authenticated = [chunk(AUTH, &[1; 25]), chunk(COOKIE_ACK, &[])].concat();
    stage.starts(
        "three",
        &steps!["sctp-raw s 0.0.0.0:0"; "ready"; "recv s"; "recv s"; "recv s";
                "packet s {client} {}", reply(CLIENT, &authenticated); "stay"],
    )?;
    let again = call(0, &init(INIT, CLIENT));
    stage.plays(
        "client",
        &steps!["sctp-raw c 0.0.0.0:0"; "packet c {late} {again}"; "packet c {late} {again}"; "packet c {late} {again}"; "recv c";
                "packet c {late} {}", call(0, &init(INIT, CLIENT + 1)); "packet c {late} {}", call(0, &init(INIT, CLIENT + 1))],
    )?;
    let mut wanted = both([
        ("client", &server("one"), 1),
        ("client", &server("two"), 1),
        ("client", &server("three"), 1),
    ]);
    wanted.insert(
        Edge::failed("dns/client", &format!("dns/{}", server("three"))),
        2,
    );
    expect(&[stage.ends()?], wanted)
}

fn server(pod: &str) -> String {
    format!("{pod} SCTP {PORT}")
}

/// From the packets to the policies, by way of a generator.
fn a_policy() -> Result<()> {
    let lab = Lab::start(cluster())?;
    let folder = lab.folder().join("policies");
    let options = GeneratorOptions::default().output(&folder, "dns", "pod");
    let mut generator = Generator::start(&lab, &options)?;
    let agent = Agent::start(&lab, &AgentOptions::streaming("node-1", &generator))?;
    let client = address(&lab, "client", V4, FROM)?;
    let server = lab.pod("dns/one")?.start("play", answers(client))?;
    let one = address(&lab, "one", V4, PORT)?;
    lab.pod("dns/client")?.play(calls(one))?;
    drop(server);
    let capture = agent.stop()?;
    ensure!(capture.lost_nothing(), "lost: {:?}", capture.losses);
    generator.stop()?;
    let mut rules = 0;
    for entry in fs::read_dir(&folder)? {
        let text = fs::read_to_string(entry?.path())?;
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        rules += lines
            .windows(2)
            .filter(|pair| {
                pair[0].ends_with(&format!("port: {PORT}")) && pair[1] == "protocol: SCTP"
            })
            .count();
    }
    ensure!(
        rules == 2,
        "{rules} rules, one for each end, in {}",
        folder.display()
    );
    Ok(())
}

/// Each has called before it hears of the other. Then each is a client, and a server, of the one association that comes of it.
fn both_call_at_once() -> Result<()> {
    let mut stage = Stage::new()?;
    let (one, two) = (stage.at("one", V4, PORT)?, stage.at("two", V4, PORT)?);
    let between = |tag, chunks: &[u8]| packet(PORT, PORT, tag, chunks);
    let side = |own: u32, other: u32, peer: SocketAddr| {
        steps!["packet s {peer} {}", between(0, &init(INIT, own));
               "packet s {peer} {}", between(other, &init(INIT_ACK, own));
               "packet s {peer} {}", between(other, &chunk(COOKIE_ECHO, &[1; 8]));
               "packet s {peer} {}", between(other, &chunk(COOKIE_ACK, &[]))]
    };
    let mut first = steps!["sctp-raw s 0.0.0.0:0"; "ready"].to_vec();
    for step in side(CLIENT, SERVER, two) {
        first.extend(["recv s".to_owned(), step]);
    }
    first.extend(steps!["stay"]);
    let mut second = steps!["sctp-raw s 0.0.0.0:0"].to_vec();
    for step in side(SERVER, CLIENT, one) {
        second.extend([step, "recv s".to_owned()]);
    }
    stage.starts("one", &first)?;
    stage.plays("two", &second)?;
    let wanted = both([("one", &server("two"), 1), ("two", &server("one"), 1)]);
    expect(&[stage.ends()?], wanted)
}

/// Packets that are cut off, lie about their lengths, are pieces, come unasked or bear another's tag: nothing comes of them.
fn what_is_no_association() -> Result<()> {
    let mut stage = Stage::new()?;
    let (client, one) = (stage.at("client", V4, FROM)?, stage.at("one", V4, PORT)?);
    let (client6, one6) = (stage.at("client", V6, FROM)?, stage.at("one", V6, PORT)?);
    let whole = init(INIT, CLIENT);
    let with_length =
        |length: u16, chunk: &[u8]| [&chunk[..2], &length.to_be_bytes(), &chunk[4..]].concat();
    let mut bad: Vec<String> = [0, 1, 3, 4, 7]
        .map(|length| call(0, &whole[..length]))
        .into();
    for length in [0, 3, 4, 19] {
        bad.push(call(0, &with_length(length, &whole)));
    }
    // What authenticates reaches beyond the packet, or is nothing.
    for length in [0, 4, 7, 200, 0xffff] {
        let auth = with_length(length, &chunk(AUTH, &[1; 24]));
        bad.push(call(0, &[auth, whole.clone()].concat()));
    }
    bad.push(call(
        0,
        &[chunk(AUTH, &[1; 4]), chunk(AUTH, &[1; 4]), whole.clone()].concat(),
    ));
    for kind in [0, INIT_ACK, ABORT, COOKIE_ECHO, 255] {
        bad.push(call(SERVER, &init(kind, CLIENT)));
    }
    bad.push(call(CLIENT, &with_length(5, &chunk(COOKIE_ACK, &[]))));
    bad.extend(["", "00", "0f1c0f1c", "0f1c0f1c0000"].map(str::to_owned));
    let mut steps = steps!["sctp-raw c 0.0.0.0:0"; "sctp-raw d [::]:0"].to_vec();
    for bytes in &bad {
        steps.extend(steps!["packet c {one} {bytes}"; "packet d {one6} {bytes}"]);
    }
    // The second piece of a packet, which begins like an INIT.
    let piece = whole_packet(client, one, 185, &whole)?;
    steps.extend(steps!["sctp-raw w 0.0.0.0:0"; "whole w"; "packet w {one} {piece}"]);
    // To oneself, and to many.
    for to in ["127.0.0.1:3868", "224.0.0.1:3868"] {
        steps.extend(steps!["packet c {to} {}", call(0, &whole)]);
    }
    steps.extend(
        steps!["packet d [::1]:3868 {}", call(0, &whole); "ready"; "recv c"; "recv c"; "stay"],
    );
    stage.starts("client", &steps)?;
    // Nobody has called: neither an answer nor a refusal is of any meaning. A cookie proves nothing before it is answered.
    let unasked = [
        reply(CLIENT, &chunk(COOKIE_ACK, &[]))[..24].to_owned(),
        reply(CLIENT, &chunk(ABORT, &[])),
        reply(CLIENT, &chunk(COOKIE_ECHO, &[1; 8])),
        reply(CLIENT, &init(INIT_ACK, SERVER)),
    ];
    let mut steps = steps!["sctp-raw s 0.0.0.0:0"; "sctp-raw t [::]:0"].to_vec();
    for bytes in &unasked {
        steps.extend(steps!["packet s {client} {bytes}"; "packet t {client6} {bytes}"]);
    }
    steps.extend(steps!["pause 300"]);
    stage.plays("one", &steps)?;
    expect(&[stage.ends()?], BTreeMap::new())
}

/// A packet with its network header, which says at which eighth of bytes of the whole this piece begins.
fn whole_packet(from: SocketAddr, to: SocketAddr, piece: u16, chunks: &[u8]) -> Result<String> {
    let (SocketAddr::V4(from), SocketAddr::V4(to)) = (from, to) else {
        anyhow::bail!("no addresses of IPv4");
    };
    let mut bytes = vec![0x45, 0, 0, 0, 0, 1];
    bytes.extend(piece.to_be_bytes());
    bytes.extend([64, 132, 0, 0]);
    bytes.extend(from.ip().octets());
    bytes.extend(to.ip().octets());
    Ok(digits(&bytes) + &call(0, chunks))
}

/// Calls for which there is no room are counted, neither more nor fewer.
fn calls_without_room() -> Result<()> {
    const MADE: u32 = 200;
    let mut stage = Stage::build(|options| options.arg("--map-entries", "256"))?;
    let (client, one) = (stage.at("client", V4, FROM)?, stage.at("one", V4, PORT)?);
    let mut steps = steps!["sctp-raw c 0.0.0.0:0"].to_vec();
    for number in 1..=MADE {
        steps.extend(steps!["packet c {one} {}", call(0, &init(INIT, number))]);
    }
    steps.extend(steps!["ready"; "stay"]);
    stage.starts("client", &steps)?;
    let mut steps = steps!["sctp-raw s 0.0.0.0:0"].to_vec();
    for number in 1..=MADE {
        steps.extend(steps![
            "packet s {client} {}",
            reply(number, &chunk(COOKIE_ACK, &[]))
        ]);
    }
    steps.extend(steps!["pause 300"]);
    stage.plays("one", &steps)?;
    let capture = stage.ends()?;
    let seen = lab::truth::edges(&capture.records);
    let count = |direction| {
        let edge = edge(direction, "client", &server("one"));
        seen.get(&edge).copied().unwrap_or(0)
    };
    let lost = capture.losses.get("sctp_calls_full").copied().unwrap_or(0);
    ensure!(
        count(Ingress) == u64::from(MADE)
            && count(Egress) > 0
            && lost > 0
            && count(Egress) + lost == u64::from(MADE),
        "{seen:?}, losses {:?}",
        capture.losses
    );
    Ok(())
}

/// Sockets for one association and for many, over IPv4, IPv6 and IPv4 on a socket of IPv6; many associations; a port on which nobody
/// listens, one that a firewall closes, and one's own pod.
fn associations(hooks: Hooks) -> Result<()> {
    let many = pace::share(1_000).max(20);
    let mut stage = Stage::build(|options| options.hooks(hooks))?;
    stage.lab.node("node-1").nft(
        "table inet firewall { chain forward { type filter hook forward priority filter;\nsctp dport 4000 drop\n}\n}",
    )?;
    stage.starts(
        "one",
        &steps!["sctp s [::]:{PORT}"; "listen s"; "ready"; "accept s a"; "accept s b"; "accept s c"; "stay"],
    )?;
    stage.starts(
        "two",
        &steps!["sctp-many s [::]:{PORT}"; "listen s"; "ready"; "echo s"],
    )?;
    stage.starts(
        "three",
        &steps!["sctp-many s 0.0.0.0:{PORT}"; "listen s"; "ready"; "echo s"],
    )?;
    for family in [V4, V6, MAPPED] {
        let one = stage.at("one", family, PORT)?;
        stage.plays(
            "client",
            &steps!["sctp c {}", any(family); "connect c {one}"],
        )?;
    }
    let [two4, two6] = [stage.at("two", V4, PORT)?, stage.at("two", V6, PORT)?];
    let three = stage.at("three", V4, PORT)?;
    stage.plays(
        "client",
        &steps!["sctp-many c 0.0.0.0:0"; "sendto c {three}"; "recv c"; "sendto c {two4}"; "recv c"; "sendto c {three}"; "recv c";
                "sctp-many d [::]:0"; "sendto d {two6}"; "recv d"; "associate {many} {three}"],
    )?;
    let (nobody, filtered) = (stage.at("one", V4, 4001)?, stage.at("one", V4, 4000)?);
    let own = stage.at("client", V4, PORT)?;
    stage.plays(
        "client",
        &steps!["sctp c 0.0.0.0:0"; "refused c {nobody}"; "sysctl net/sctp/rto_initial 1000"; "sctp d 0.0.0.0:0"; "begin d {filtered}";
                "sctp s [::]:{PORT}"; "listen s"; "sctp e 0.0.0.0:0"; "connect e 127.0.0.1:{PORT}"; "sctp f 0.0.0.0:0"; "connect f {own}";
                "sctp g [::]:0"; "connect g [::1]:{PORT}"; "pause 1500"],
    )?;
    let mut wanted = both([
        ("client", &server("one"), 3),
        ("client", &server("two"), 2),
        ("client", &server("three"), 1 + many),
    ]);
    for port in [4000, 4001] {
        wanted.insert(
            Edge::failed("dns/client", &format!("dns/one SCTP {port}")),
            1,
        );
    }
    expect(&[stage.ends()?], wanted)
}

/// Associations that are older than the agent, of either kind of socket, and one that a listener of that age takes later.
fn what_was_open_before(hooks: Hooks) -> Result<()> {
    let lab = Lab::start(cluster())?;
    let listens = |kind: &str| steps!["{kind} s [::]:{PORT}"; "listen s"; "ready"; "stay"];
    let one = lab.pod("dns/one")?.start("play", listens("sctp"))?;
    let two = lab.pod("dns/two")?.start("play", listens("sctp-many"))?;
    let first = address(&lab, "one", V4, PORT)?;
    let second = address(&lab, "two", V6, PORT)?;
    let connected = steps!["sctp c 0.0.0.0:0"; "connect c {first}"; "sctp d [::]:0"; "connect d {second}"; "ready"; "stay"];
    let client = lab.pod("dns/client")?.start("play", connected)?;
    let agent = Agent::start(&lab, &AgentOptions::stdout("node-1").hooks(hooks))?;
    let third = address(&lab, "one", V6, PORT)?;
    lab.pod("dns/three")?
        .play(steps!["sctp c [::]:0"; "connect c {third}"])?;
    let capture = agent.stop()?;
    for record in &capture.records {
        let process = record.process.clone();
        let process = process.with_context(|| format!("no process: {record:?}"))?;
        let expected = match (record.direction, record.dst.to_string().as_str()) {
            (Egress, _) if record.src.to_string() == "dns/client" => client.pid(),
            (Ingress, "dns/one") => one.pid(),
            (Ingress, "dns/two") => two.pid(),
            _ => continue,
        };
        let is_older = record.src.to_string() == "dns/client";
        ensure!(
            process.pid == expected || (process.pid == 0 && !is_older && !tracing_keeps()),
            "{process:?}, not {expected}, in {record:?}"
        );
    }
    let wanted = both([
        ("client", &server("one"), 1),
        ("client", &server("two"), 1),
        ("three", &server("one"), 1),
    ]);
    expect(&[capture], wanted)
}

/// The client knows the service, the server its own port; from the node itself too, whose own rules translate the address.
fn a_service_address(hooks: Hooks) -> Result<()> {
    let mut stage = Stage::build(|options| options.hooks(hooks))?;
    stage.starts(
        "one",
        &steps!["sctp-many s [::]:5868"; "listen s"; "ready"; "echo s"],
    )?;
    for (family, address) in stage.lab.cluster().services[1]
        .addresses()
        .into_iter()
        .enumerate()
    {
        let service = SocketAddr::new(address, PORT);
        let steps = steps!["sctp c {}", any(family); "connect c {service}"; "send c"; "recv c"];
        stage.plays("client", &steps)?;
        stage.lab.node("node-1").play(&steps)?;
    }
    let own = "dns/one SCTP 5868";
    let wanted = [
        (
            Edge::new(Egress, "dns/client", "service dns/diameter SCTP 5868"),
            2,
        ),
        (edge(Ingress, "client", "one SCTP 5868"), 2),
        (Edge::new(Egress, "node node-1", own), 2),
        (Edge::new(Ingress, "node node-1", own), 2),
    ];
    expect(&[stage.ends()?], wanted.into())
}

/// The caller's process and container at one end, at the other those of who listens: its process only where the hooks are typed.
fn whose_sockets(hooks: Hooks) -> Result<()> {
    let mut stage = Stage::build(|options| options.hooks(hooks))?;
    let listens = stage.starts(
        "one",
        &steps!["sctp s [::]:{PORT}"; "listen s"; "ready"; "accept s a"; "recv a"; "stay"],
    )?;
    let one = stage.at("one", V4, PORT)?;
    let calls = stage.starts(
        "client",
        &steps!["sctp c 0.0.0.0:0"; "connect c {one}"; "ready"; "stay"],
    )?;
    let capture = stage.ends()?;
    for (direction, wanted) in [(Egress, calls), (Ingress, listens)] {
        let owner = owner(&capture, direction)?;
        let is_right = if is_known(direction, hooks) {
            owner == wanted
        } else {
            owner.container == wanted.container
        };
        ensure!(is_right, "{direction}: {owner:?}, not {wanted:?}");
    }
    expect(&[capture], both([("client", &server("one"), 1)]))
}

/// Whether the process at this end is known, and not its container alone.
fn is_known(direction: Direction, hooks: Hooks) -> bool {
    direction == Egress || (hooks == Hooks::Btf && tracing_keeps())
}

/// Whether this kernel lets tracing programs keep something with a socket, as from 5.11 on.
fn tracing_keeps() -> bool {
    fs::read_to_string("/proc/kallsyms")
        .is_ok_and(|symbols| symbols.contains("bpf_sk_storage_get_tracing"))
}
