//! `authorization.onboarding.tetrate.io/v1alpha1` OnboardingPolicy, read into [`onboarding_core::policy::Policy`].

use crate::reader::{Item, Map};
use crate::syntax;
use onboarding_core::label::{LabelSelector, Operator, Requirement};
use onboarding_core::policy::{
    AttributeMatcher, AwsComputeMatcher, AwsMatcher, AzureMatcher, GcpMatcher, JwtMatcher, Matcher, Rule,
};

/// `spec.allow` of an OnboardingPolicy.
pub(crate) fn rules(root: &mut Map<'_>) -> Vec<Rule> {
    let Some(mut spec) = root.required("spec").and_then(|spec| spec.map()) else { return Vec::new() };
    let rules = spec.required_items("allow", rule);
    spec.close();
    rules
}

fn rule(item: &Item<'_>) -> Option<Rule> {
    let mut rule = item.map()?;
    let workloads = rule.required_items("workloads", matcher);
    let onboard_to = rule.required_items("onboardTo", |item| {
        let mut target = item.map()?;
        let selector = target.required("workloadGroupSelector").and_then(|item| selector(&item));
        target.close();
        selector
    });
    rule.close();
    Some(Rule { workloads, onboard_to })
}

fn matcher(item: &Item<'_>) -> Option<Matcher> {
    let mut workload = item.map()?;
    let found = workload.one_of(&["aws", "jwt", "gcp", "azure"]);
    workload.close();
    let read = |(kind, item): &(&str, Item<'_>)| match *kind {
        "aws" => aws(item).map(Matcher::Aws),
        "jwt" => jwt(item).map(Matcher::Jwt),
        "gcp" => gcp(item).map(Matcher::Gcp),
        _ => azure(item).map(Matcher::Azure),
    };
    found.iter().map(read).next_back().flatten()
}

fn aws(item: &Item<'_>) -> Option<AwsMatcher> {
    let mut aws = item.map()?;
    let partitions = aws.texts("partitions", syntax::any);
    let accounts = aws.required_texts("accounts", syntax::aws_account);
    let regions = aws.texts("regions", syntax::any);
    let zones = aws.texts("zones", syntax::any);
    let mut compute = None;
    for (kind, item) in aws.one_of(&["ec2", "ecs"]) {
        let Some(mut map) = item.map() else { continue };
        let clusters = if kind == "ecs" { map.texts("clusters", syntax::any) } else { Vec::new() };
        let iam_role_names = map.texts("iamRoleNames", syntax::any);
        map.close();
        if kind == "ecs" {
            asks_too_much(&item, &[("regions", &regions), ("zones", &zones), ("ecs.clusters", &clusters)]);
        }
        compute = Some(match kind {
            "ecs" => AwsComputeMatcher::Ecs { clusters, iam_role_names },
            _ => AwsComputeMatcher::Ec2 { iam_role_names },
        });
    }
    aws.close();
    Some(AwsMatcher { partitions, accounts, regions, zones, compute: compute? })
}

fn jwt(item: &Item<'_>) -> Option<JwtMatcher> {
    let mut jwt = item.map()?;
    let issuer = jwt.required_as("issuer", syntax::issuer);
    let subjects = jwt.texts("subjects", syntax::ascii);
    let attributes = jwt.optional("attributes").and_then(|item| item.list()).unwrap_or_default();
    let attributes = attributes.iter().filter_map(|item| {
        let mut attribute = item.map()?;
        let name = attribute.required_as("name", syntax::any);
        let values = attribute.texts("values", syntax::any);
        attribute.close();
        Some(AttributeMatcher { name: name?, values })
    });
    let attributes = attributes.collect();
    jwt.close();
    Some(JwtMatcher { issuer: issuer?, subjects, attributes })
}

fn gcp(item: &Item<'_>) -> Option<GcpMatcher> {
    matches_nothing(item, "GCP");
    let mut gcp = item.map()?;
    if ["projectNumbers", "projectIds"].iter().all(|key| gcp.optional(key).is_none_or(|item| item.is_empty_list())) {
        gcp.fault("must have at least one of projectNumbers and projectIds");
    }
    let project_numbers = gcp.texts("projectNumbers", syntax::digits);
    let project_ids = gcp.texts("projectIds", syntax::any);
    let regions = gcp.texts("regions", syntax::any);
    let zones = gcp.texts("zones", syntax::any);
    let instance_ids = nested_texts(&mut gcp, "gce", "instanceIds");
    gcp.close();
    Some(GcpMatcher { project_numbers, project_ids, regions, zones, instance_ids })
}

fn azure(item: &Item<'_>) -> Option<AzureMatcher> {
    matches_nothing(item, "Azure");
    let mut azure = item.map()?;
    let subscriptions = azure.required_texts("subscriptions", syntax::any);
    let resource_groups = azure.texts("resourceGroups", syntax::any);
    let vm_ids = nested_texts(&mut azure, "compute", "vmIds");
    azure.close();
    Some(AzureMatcher { subscriptions, resource_groups, vm_ids })
}

fn nested_texts(map: &mut Map<'_>, outer: &'static str, inner: &'static str) -> Vec<String> {
    let Some(mut map) = map.optional(outer).and_then(|item| item.map()) else { return Vec::new() };
    let texts = map.texts(inner, syntax::any);
    map.close();
    texts
}

fn matches_nothing(item: &Item<'_>, platform: &str) {
    item.warn(format!("matches nothing yet: this version has no attestor that proves {platform} identities"));
}

/// Nothing that AWS gives a task proves where it runs.
fn asks_too_much(item: &Item<'_>, unprovable: &[(&str, &Vec<String>)]) {
    let asked: Vec<_> = unprovable.iter().filter(|(_, values)| !values.is_empty()).map(|(name, _)| *name).collect();
    if !asked.is_empty() {
        item.warn(format!(
            "matches nothing: of an ECS task only partition, account and IAM role are proven, and this asks for {} too",
            asked.join(" and ")
        ));
    }
}

/// A standard label selector; `{}` selects everything.
fn selector(item: &Item<'_>) -> Option<LabelSelector> {
    let mut selector = item.map()?;
    if selector.is_null("matchLabels") || selector.is_null("matchExpressions") {
        item.warn("has a key without a value, which counts as absent; write {} if it is to select every group");
    }
    let labels = selector.labels("matchLabels");
    let expressions = selector.optional("matchExpressions").and_then(|item| item.list()).unwrap_or_default();
    let expressions: Vec<_> = expressions.iter().filter_map(requirement).collect();
    selector.close();
    let labels = labels.into_iter().map(|(key, value)| Requirement { key, operator: Operator::In(vec![value]) });
    Some(LabelSelector { requirements: labels.chain(expressions).collect() })
}

fn requirement(item: &Item<'_>) -> Option<Requirement> {
    #[derive(Clone, Copy)]
    enum Word {
        In,
        NotIn,
        Exists,
        DoesNotExist,
    }
    let mut requirement = item.map()?;
    let key = requirement.required_as("key", syntax::label_key);
    let word = requirement.required("operator").and_then(|item| {
        item.word(&[
            ("In", Word::In),
            ("NotIn", Word::NotIn),
            ("Exists", Word::Exists),
            ("DoesNotExist", Word::DoesNotExist),
        ])
    });
    let values = requirement.optional("values");
    let items = values.as_ref().and_then(|item| item.list()).unwrap_or_default();
    match word {
        Some(Word::In | Word::NotIn) if items.is_empty() => {
            requirement.fault_at("values", "must have at least one item where the operator is In or NotIn");
        }
        Some(Word::Exists | Word::DoesNotExist) if !items.is_empty() => {
            requirement.fault_at("values", "must be empty where the operator is Exists or DoesNotExist");
        }
        _ => {}
    }
    // A label may have an empty value, so an item may be empty here.
    let values =
        items.iter().filter_map(|item| syntax::label_value(item.text()?).map_err(|message| item.fault(message)).ok());
    let values = values.collect();
    requirement.close();
    let operator = match word? {
        Word::In => Operator::In(values),
        Word::NotIn => Operator::NotIn(values),
        Word::Exists => Operator::Exists,
        Word::DoesNotExist => Operator::DoesNotExist,
    };
    Some(Requirement { key: key?, operator })
}
