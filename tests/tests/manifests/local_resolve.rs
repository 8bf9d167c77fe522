//! With `local-resolve`, agents leave names to the generator.

use agent::args::{Args, Resolve};
use clap::Parser as _;
use flow::source::{Scope, Source};

use crate::{
    command_lines::{serve, words},
    load::{container, spec, with},
    references::binds,
    rights::allows_reading,
};

#[test]
fn agents_leave_names_to_the_generator() {
    let all = with("local-resolve");
    let args = Args::try_parse_from(words("microshield-agent", container(all.agent()))).unwrap();
    assert_eq!(args.topology.source(), Source::Kube);
    assert_eq!(args.resolve, Resolve::Local);

    let pod = spec(all.generator());
    assert_eq!(pod.automount_service_account_token, Some(true));
    let serve = serve(container(all.generator()));
    assert_eq!(serve.get_one("topology"), Some(&Source::Kube));
}

#[test]
fn each_may_read_what_it_reads() {
    let all = with("local-resolve");
    let node = Scope::OneNode("node-1".to_owned());
    allows_reading(all.role("microshield-agent"), &node);
    let generators = all.role("microshield-generator");
    allows_reading(generators, &Scope::Everything);
    let mut bindings = all.cluster_role_bindings.iter();
    let binding = bindings
        .find(|binding| binding.role_ref.name == "microshield-generator")
        .unwrap();
    binds(binding, generators, all.generator());
}
