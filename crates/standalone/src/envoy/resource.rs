//! One resource of Envoy's, and what is different between two of the same name, or between two sets of them.

use aws_lc_rs::digest::{Context, SHA256};
use bytes::Bytes;
use imara_diff::{Algorithm, Diff, InternedInput};
use onboarding_wire::onboarding::{self as pb, Splice, XdsType};
use prost::Message;
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, Serializer};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

/// Bases to which a difference is kept: all agents have the last one, or one of those before it.
const BASES: usize = 8;

/// Rendered.
#[derive(Debug)]
pub struct Resource {
    pub kind: XdsType,
    pub name: String,
    /// Protobuf JSON with its `@type`; each element of an array begins on a line of its own.
    pub json: Bytes,
    /// SHA-256 of all of the above.
    pub digest: [u8; 32],
    splices: Differences<Arc<[Splice]>>,
}

/// By type and name.
pub type Resources<'a> = BTreeMap<(XdsType, &'a str), &'a Arc<Resource>>;

/// What makes one set of resources of another.
#[derive(Debug, Default)]
pub struct Changes {
    pub changed: Vec<pb::XdsResource>,
    pub removed: Vec<pb::XdsResourceName>,
}

/// To the bases of a moment ago, by their digests: made once for all agents, which have the same.
#[derive(Debug)]
pub struct Differences<T>(Mutex<Vec<([u8; 32], T)>>);

impl PartialEq for Resource {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Eq for Resource {}

impl Resource {
    pub(super) fn new(kind: XdsType, name: &str, value: &impl Serialize) -> Arc<Self> {
        // Without spare room: it is kept for as long as the workload is in the mesh.
        let json = Bytes::from(by_lines(value).into_boxed_slice());
        let mut context = Context::new(&SHA256);
        context.update(kind.as_str_name().as_bytes());
        context.update(&[0]);
        context.update(name.as_bytes());
        context.update(&[0]);
        context.update(&json);
        let mut digest = [0; 32];
        digest.copy_from_slice(context.finish().as_ref());
        Arc::new(Self { kind, name: name.to_owned(), json, digest, splices: Differences::default() })
    }

    /// What makes this of `base`, which is another; empty where the whole of it is no larger.
    fn splices(&self, base: &Self) -> Arc<[Splice]> {
        self.splices.to(&base.digest, || {
            let splices = difference(&base.json, &self.json);
            let size: usize = splices.iter().map(|splice| splice.encoded_len() + 2).sum();
            if size < self.json.len() { splices.into() } else { Arc::default() }
        })
    }

    /// The message that brings it to whoever has `held`.
    fn message(&self, held: Option<&Arc<Self>>) -> pb::XdsResource {
        let splices = held.map(|held| self.splices(held).to_vec()).unwrap_or_default();
        let json = if splices.is_empty() { self.json.clone() } else { Bytes::new() };
        pb::XdsResource { r#type: self.kind.into(), name: self.name.clone(), json, splices }
    }
}

impl Changes {
    pub fn between(before: &Resources<'_>, after: &Resources<'_>) -> Self {
        let changed = after.iter().filter_map(|(key, resource)| {
            let held = before.get(key).copied();
            held.is_none_or(|held| held.digest != resource.digest).then(|| resource.message(held))
        });
        let gone = before.keys().filter(|key| !after.contains_key(key));
        let removed = gone.map(|(kind, name)| pb::XdsResourceName { r#type: (*kind).into(), name: (*name).to_owned() });
        Self { changed: changed.collect(), removed: removed.collect() }
    }
}

impl<T> Default for Differences<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T: Clone> Differences<T> {
    pub fn to(&self, base: &[u8; 32], make: impl FnOnce() -> T) -> T {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, made)) = known.iter().find(|(of, _)| of == base) {
            return made.clone();
        }
        if known.len() >= BASES {
            known.remove(0);
        }
        let made = make();
        known.push((*base, made.clone()));
        made
    }
}

/// Compact, but for a line to each element of an array.
fn by_lines(value: &impl Serialize) -> Vec<u8> {
    struct Lines(CompactFormatter);
    impl Formatter for Lines {
        fn begin_array_value<W: io::Write + ?Sized>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
            self.0.begin_array_value(writer, first)?;
            writer.write_all(b"\n")
        }
    }
    let mut json = Vec::new();
    let written = value.serialize(&mut Serializer::with_formatter(&mut json, Lines(CompactFormatter)));
    // Memory takes everything, and all keys are strings.
    debug_assert!(written.is_ok());
    json
}

/// Line by line.
fn difference(base: &Bytes, next: &Bytes) -> Vec<Splice> {
    // Mostly one line changed, and what is before and after it is compared faster as it is.
    let common = |pairs: &mut dyn Iterator<Item = (&u8, &u8)>| pairs.take_while(|(a, b)| a == b).count();
    let before = common(&mut base.iter().zip(next.iter()));
    let before = base[..before].iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    let after = common(&mut base[before..].iter().rev().zip(next[before..].iter().rev()));
    // From the first line of it that is whole.
    let tail = &base[base.len() - after..];
    let after = tail.iter().position(|byte| *byte == b'\n').map_or(0, |at| tail.len() - at - 1);

    let (old, new) = (&base[before..base.len() - after], next.slice(before..next.len() - after));
    let input = InternedInput::new(old, new.as_ref());
    let diff = Diff::compute(Algorithm::Histogram, &input);
    let places = |lines: &[imara_diff::Token]| -> Vec<usize> {
        let mut at = 0;
        let ends = lines.iter().map(|line| {
            at += input.interner[*line].len();
            at
        });
        std::iter::once(0).chain(ends).collect()
    };
    let (old_places, new_places) = (places(&input.before), places(&input.after));
    let place = |places: &[usize], line: u32| places.get(line as usize).copied().unwrap_or_default();
    diff.hunks()
        .map(|hunk| {
            let (from, to) = (place(&old_places, hunk.before.start), place(&old_places, hunk.before.end));
            let insert = place(&new_places, hunk.after.start)..place(&new_places, hunk.after.end);
            Splice { offset: (before + from) as u64, length: (to - from) as u64, insert: new.slice(insert) }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use onboarding_wire::xds::spliced;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn assignment(endpoints: &[(u8, bool)]) -> Arc<Resource> {
        let of = |(host, ready): &(u8, bool)| json!({"address": format!("10.0.0.{host}"), "ready": ready});
        let endpoints: Vec<Value> = endpoints.iter().map(of).collect();
        Resource::new(XdsType::Endpoint, "ratings", &json!({"cluster_name": "ratings", "endpoints": endpoints}))
    }

    #[test]
    fn one_of_many_costs_what_it_is_itself() {
        type Hosts = Vec<(u8, bool)>;
        let before: Hosts = (0..200).map(|host| (host, true)).collect();
        let bytes = |change: &dyn Fn(&mut Hosts)| {
            let mut after = before.clone();
            change(&mut after);
            let (before, after) = (assignment(&before), assignment(&after));
            let splices = after.splices(&before);
            assert_eq!(spliced(&before.json, &splices).unwrap(), after.json, "{splices:?}");
            splices.iter().map(Message::encoded_len).sum::<usize>()
        };
        assert!(bytes(&|hosts| hosts[100].1 = false) < 60);
        assert!(bytes(&|hosts| hosts.retain(|(host, _)| *host != 100)) < 10);
        assert!(bytes(&|hosts| hosts.insert(100, (250, true))) < 60);
        assert!(bytes(&|hosts| (hosts[0].1, hosts[100].1, hosts[199].1) = (false, false, false)) < 180);
    }

    #[test]
    fn a_resource_is_the_json_that_it_was_made_of() {
        let value = json!({"a": [1, [2, "x\ny"], {}], "b": []});
        let resource = Resource::new(XdsType::Cluster, "c", &value);
        assert_eq!(serde_json::from_slice::<Value>(&resource.json).unwrap(), value);
    }

    proptest! {
        #[test]
        fn the_splices_make_the_next_of_any_base(
            before in proptest::collection::vec((0..20u8, any::<bool>()), 0..40),
            after in proptest::collection::vec((0..20u8, any::<bool>()), 0..40),
        ) {
            let (before, after) = (assignment(&before), assignment(&after));
            prop_assert_eq!(&spliced(&before.json, &difference(&before.json, &after.json)).unwrap(), &after.json);
            let splices = after.splices(&before);
            prop_assert!(splices.is_empty() || spliced(&before.json, &splices).unwrap() == after.json);
            // And of any set.
            let set = |resource| Resources::from([((XdsType::Endpoint, "ratings"), resource)]);
            prop_assert_eq!(Changes::between(&set(&before), &set(&after)).changed.is_empty(), before == after);
        }
    }
}
