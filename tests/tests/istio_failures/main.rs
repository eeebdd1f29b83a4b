//! What fails, and what is many, on a real cluster with a real Istio: planes that are killed, networks that part, an istiod that
//! restarts, configuration that changes while workloads join.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, reason = "tests")]
#![allow(dead_code, reason = "the agent is shared with other tests")]

mod addresses;
#[path = "../../../crates/endpoint/tests/support/agent.rs"]
mod agent;
mod api;
mod changes;
mod crowd;
mod foreign;
mod istiod;
mod replicas;
mod time;
mod writes;

use onboarding_tests::scenario::{Scenario, run};
use onboarding_tests::world::Setup;
use std::process::ExitCode;

/// The first makes the pair of VMs, with tokens of seconds.
const SCENARIOS: &[Scenario] = &[
    ("istiod_restarts_and_tokens_are_renewed_while_vms_talk", istiod::restarts),
    ("a_plane_that_is_killed_under_two_hundred_agents_loses_none_of_them", replicas::one_is_killed),
    ("two_first_keys_for_one_identity_race_on_two_planes_and_one_wins", replicas::first_keys_race),
    ("an_api_server_that_is_killed_ends_no_session_and_lets_newcomers_wait", api::is_killed),
    ("what_is_changed_while_workloads_join_takes_effect_and_fails_no_join", changes::while_joining),
    ("objects_of_others_are_left_alone", foreign::objects_of_others),
    ("objects_of_before_the_schema_count_as_absent", foreign::of_before_the_schema),
    ("hosts_of_ipv6_and_of_both_kinds_join_and_talk", addresses::of_ipv6),
    ("time_heals_and_ends", time::passes),
];

fn main() -> ExitCode {
    let flags = ["--grace-period", "30s", "--authorizations-per-second", "1000"];
    run(Setup { istio: true, plane_flags: flags.map(str::to_owned).to_vec(), ..Setup::default() }, SCENARIOS)
}
