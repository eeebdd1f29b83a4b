//! From proven facts to the matchers that may match them, at a cost that doesn't grow with those that can't.
//!
//! Each matcher stands under the constraints that tell it apart best. A look-up asks for every combination of the identity's
//! own facts and "any": eight for AWS, and one or two for each attribute of a JWT.

use super::{AttributeMatcher, AwsComputeMatcher, AwsMatcher, JwtMatcher, Matcher, Policy};
use crate::identity::{AwsCompute, Fact, Identity};
use std::collections::HashMap;

/// Indices of a policy, of its rule, of the rule's matcher.
pub(super) type Candidate = (usize, usize, usize);

/// A text, numbered, so that keys are small and look-ups don't allocate.
type Id = u32;
const ANY: Id = Id::MAX;

/// How many keys one matcher may stand under before it is filed under fewer constraints instead.
const MOST_KEYS: usize = 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Key {
    Ec2 { namespace: Id, account: Id, role: Id, zone: Id, region: Id },
    Ecs { namespace: Id, account: Id, role: Id, zone: Id, region: Id },
    Jwt { namespace: Id, issuer: Id, subject: Id, attribute: Id, value: Id },
}

#[derive(Debug, Default)]
pub(super) struct Index {
    ids: HashMap<String, Id>,
    candidates: HashMap<Key, Vec<Candidate>>,
}

impl Index {
    pub(super) fn new(policies: &[Policy]) -> Self {
        let mut index = Self::default();
        for (p, policy) in policies.iter().enumerate() {
            let namespace = index.intern(&policy.namespace);
            for (r, rule) in policy.rules.iter().enumerate() {
                for (m, matcher) in rule.workloads.iter().enumerate() {
                    for key in index.keys(namespace, matcher) {
                        let here = index.candidates.entry(key).or_default();
                        // A list that names a value twice.
                        if here.last() != Some(&(p, r, m)) {
                            here.push((p, r, m));
                        }
                    }
                }
            }
        }
        index
    }

    /// Whatever may match; each has still to be asked.
    pub(super) fn candidates<'a>(
        &'a self,
        namespace: &str,
        identity: &'a Identity,
    ) -> impl Iterator<Item = Candidate> + 'a {
        let keys = self.ids.get(namespace).map(|namespace| self.lookups(*namespace, identity)).unwrap_or_default();
        keys.into_iter().filter_map(|key| self.candidates.get(&key)).flatten().copied()
    }

    fn intern(&mut self, text: &str) -> Id {
        if let Some(id) = self.ids.get(text) {
            return *id;
        }
        // Fewer than 2^32 texts fit into memory.
        let id = Id::try_from(self.ids.len()).unwrap_or(ANY - 1);
        self.ids.insert(text.to_owned(), id);
        id
    }

    fn intern_all(&mut self, texts: &[String], room: &mut usize) -> Vec<Id> {
        if texts.is_empty() || texts.len() > *room {
            return vec![ANY];
        }
        *room /= texts.len();
        texts.iter().map(|text| self.intern(text)).collect()
    }

    fn keys(&mut self, namespace: Id, matcher: &Matcher) -> Vec<Key> {
        match matcher {
            Matcher::Aws(aws) => self.aws_keys(namespace, aws),
            Matcher::Jwt(jwt) => self.jwt_keys(namespace, jwt),
            // They match nothing.
            Matcher::Gcp(_) | Matcher::Azure(_) => Vec::new(),
        }
    }

    fn aws_keys(&mut self, namespace: Id, aws: &AwsMatcher) -> Vec<Key> {
        let accounts: Vec<Id> = aws.accounts.iter().map(|account| self.intern(account)).collect();
        let mut room = MOST_KEYS / accounts.len().clamp(1, MOST_KEYS);
        let (ec2, roles) = match &aws.compute {
            AwsComputeMatcher::Ec2 { iam_role_names } => (true, iam_role_names),
            AwsComputeMatcher::Ecs { iam_role_names, .. } => (false, iam_role_names),
        };
        let roles = self.intern_all(roles, &mut room);
        let zones = self.intern_all(&aws.zones, &mut room);
        let regions = self.intern_all(&aws.regions, &mut room);
        let mut keys = Vec::new();
        for &account in &accounts {
            for &role in &roles {
                for &zone in &zones {
                    for &region in &regions {
                        keys.push(aws_key(ec2, namespace, account, role, zone, region));
                    }
                }
            }
        }
        keys
    }

    fn jwt_keys(&mut self, namespace: Id, jwt: &JwtMatcher) -> Vec<Key> {
        let issuer = self.intern(&jwt.issuer);
        if !jwt.subjects.is_empty() {
            let key = |subject| Key::Jwt { namespace, issuer, subject, attribute: ANY, value: ANY };
            return jwt.subjects.iter().map(|subject| key(self.intern(subject))).collect();
        }
        // The attribute whose values the fewest matchers ask for tells most; one that only has to be there tells least.
        let told = jwt.attributes.iter().filter(|attribute| !attribute.values.is_empty());
        match told.min_by_key(|attribute| (self.load(namespace, issuer, attribute), attribute.values.len())) {
            Some(attribute) => {
                let name = self.intern(&attribute.name);
                let key = |value| Key::Jwt { namespace, issuer, subject: ANY, attribute: name, value };
                attribute.values.iter().map(|value| key(self.intern(value))).collect()
            }
            None => vec![Key::Jwt { namespace, issuer, subject: ANY, attribute: ANY, value: ANY }],
        }
    }

    /// How many matchers stand under an attribute's values so far.
    fn load(&self, namespace: Id, issuer: Id, attribute: &AttributeMatcher) -> usize {
        let Some(&name) = self.ids.get(&attribute.name) else { return 0 };
        let under = |value: &String| {
            let value = *self.ids.get(value)?;
            self.candidates.get(&Key::Jwt { namespace, issuer, subject: ANY, attribute: name, value }).map(Vec::len)
        };
        attribute.values.iter().filter_map(under).sum()
    }

    fn lookups(&self, namespace: Id, identity: &Identity) -> Vec<Key> {
        match identity {
            Identity::Aws(aws) => {
                let (ec2, role) = match &aws.compute {
                    AwsCompute::Ec2 { iam_role, .. } => (true, iam_role),
                    AwsCompute::Ecs { iam_role, .. } => (false, iam_role),
                };
                let Some(account) = self.id(Some(&aws.account)) else { return Vec::new() };
                let or_any = |id: Option<Id>| [Some(ANY), id].into_iter().flatten();
                let zone = self.id(Some(&aws.zone));
                let region = self.id(Some(&aws.region));
                let mut keys = Vec::with_capacity(8);
                for role in or_any(self.id(role.as_ref())) {
                    for zone in or_any(zone) {
                        for region in or_any(region) {
                            keys.push(aws_key(ec2, namespace, account, role, zone, region));
                        }
                    }
                }
                keys
            }
            Identity::Jwt(jwt) => {
                let Some(issuer) = self.id(Some(&jwt.issuer)) else { return Vec::new() };
                let key = |subject, attribute, value| Key::Jwt { namespace, issuer, subject, attribute, value };
                let mut keys = vec![key(ANY, ANY, ANY)];
                keys.extend(self.id(Some(&jwt.subject)).map(|subject| key(subject, ANY, ANY)));
                for (name, fact) in &jwt.attributes {
                    let (Some(&name), Some(value)) = (self.ids.get(name), fact.proven()) else { continue };
                    let values = value.values().iter().filter_map(|value| self.ids.get(value));
                    keys.extend(values.map(|&value| key(ANY, name, value)));
                }
                keys
            }
            Identity::Gcp(_) | Identity::Azure(_) => Vec::new(),
        }
    }

    /// The number of a proven text, if any policy names it.
    fn id(&self, fact: Option<&Fact<String>>) -> Option<Id> {
        self.ids.get(fact?.proven()?).copied()
    }
}

fn aws_key(ec2: bool, namespace: Id, account: Id, role: Id, zone: Id, region: Id) -> Key {
    if ec2 {
        Key::Ec2 { namespace, account, role, zone, region }
    } else {
        Key::Ecs { namespace, account, role, zone, region }
    }
}
