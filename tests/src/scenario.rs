//! Runs the scenarios of one file, one after the other, in one world.

use crate::world::{Setup, World};
use libtest_mimic::{Arguments, Failed, Trial};
use onboarding_testkit::netns::test_inside;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

/// A scenario leaves the world as it found it.
pub type Scenario = (&'static str, fn(&mut World) -> anyhow::Result<()>);

/// What `main` of a file of scenarios is. Where namespaces can't be made it says so and skips, except in CI, where that is a failure.
pub fn run(setup: Setup, scenarios: &'static [Scenario]) -> ExitCode {
    let arguments = Arguments::from_args();
    if arguments.list {
        let none = scenarios.iter().map(|(name, _)| Trial::test(*name, || Ok(()))).collect();
        return libtest_mimic::run(&arguments, none).exit_code();
    }
    test_inside(|lab| {
        let mut arguments = arguments.clone();
        arguments.test_threads = Some(1);
        let world: Arc<Mutex<Option<anyhow::Result<World>>>> = Arc::default();
        let trials = scenarios.iter().map(|(name, scenario)| {
            let (world, setup, lab) = (Arc::clone(&world), setup.clone(), lab.clone());
            Trial::test(*name, move || {
                let mut world = world.lock().unwrap_or_else(PoisonError::into_inner);
                match world.get_or_insert_with(|| World::start(&lab, setup)) {
                    Ok(world) => scenario(world)
                        .and_then(|()| world.no_panics())
                        .map_err(|error| Failed::from(format!("{error:#}\n{}", world.report()))),
                    Err(error) => Err(Failed::from(format!("there is no world: {error:#}"))),
                }
            })
        });
        libtest_mimic::run(&arguments, trials.collect()).exit_code()
    })
}
