//! Amazon EC2 (what the identity document proves, and what callers by STS add to it) and ECS.

pub mod certificates;
pub mod document;
pub mod ecs;
pub mod region;
pub mod sts;

use crate::{AttestError, Context};
use certificates::Certificates;
use document::InstanceIdentity;
use onboarding_core::identity::{Attested, AwsCompute, AwsIdentity, Fact, Identity, Proven, Replay};
use onboarding_wire::onboarding::{AwsEc2Credential, SignedCallerIdentity};
use onboarding_wire::proof::sts_binding;
use sts::{CallerIdentity, Callers, Principal, Request};

/// The document is verified first, then STS is asked about both callers at once.
pub(crate) async fn attest(
    certificates: &Certificates,
    callers: &Callers,
    credential: &AwsEc2Credential,
    context: Context<'_>,
) -> Result<Attested, AttestError> {
    let instance = document::verify(&credential.identity_document, certificates)
        .map_err(|error| AttestError::Refused(error.to_string()))?;
    let by_instance = identify(callers, &instance, credential.instance.as_ref(), "the instance", context);
    let by_role = identify(callers, &instance, credential.role.as_ref(), "its role", context);
    let (by_instance, by_role) = tokio::try_join!(by_instance, by_role)?;

    if let Some(caller) = &by_instance {
        proves_instance(caller, &instance)?;
    }
    let role = by_role.as_ref().map(|caller| role_of(caller, &instance)).transpose()?;
    // The instance's own credentials are AWS's to give: somebody held them, signed for this key, now. A role's session could be anybody's.
    let replay = if by_instance.is_some() { Replay::BoundToKey } else { Replay::Forever };
    Ok(Attested { identity: identity(instance, role), issuer_short_name: None, replay })
}

/// What a document alone proves, in the terms of policies.
pub fn identity(instance: InstanceIdentity, role: Option<Proven<String>>) -> Identity {
    let proven = |value: String| Fact::from(Proven::by_attestor(value));
    Identity::Aws(AwsIdentity {
        partition: proven(instance.partition.to_owned()),
        account: proven(instance.account),
        region: proven(instance.region),
        zone: proven(instance.zone),
        compute: AwsCompute::Ec2 { instance_id: proven(instance.instance_id), iam_role: role.map(Fact::from) },
    })
}

async fn identify(
    callers: &Callers,
    instance: &InstanceIdentity,
    parts: Option<&SignedCallerIdentity>,
    of: &str,
    context: Context<'_>,
) -> Result<Option<CallerIdentity>, AttestError> {
    let Some(parts) = parts else { return Ok(None) };
    let caller = ask(callers, parts, &instance.region, of, context).await?;
    if caller.account != instance.account || caller.partition != instance.partition {
        return Err(AttestError::Refused(format!(
            "the identity document is of account {} ({}), but the caller for {of} is of account {} ({:.64})",
            instance.account, instance.partition, caller.account, caller.partition
        )));
    }
    Ok(Some(caller))
}

/// Who signed for `of`, as AWS says. The region is one of AWS's, by its name.
async fn ask(
    callers: &Callers,
    parts: &SignedCallerIdentity,
    region: &str,
    of: &str,
    context: Context<'_>,
) -> Result<CallerIdentity, AttestError> {
    let binding = sts_binding(context.plane_uid, context.challenge, context.key);
    let request = Request::rebuild(parts, region, binding, context.now).map_err(|problem| {
        AttestError::Refused(format!("the GetCallerIdentity request signed by {of} can't be used: {problem}"))
    })?;
    let said = |error: String| format!("asking AWS who signed for {of}: {error}");
    callers.identify(&request, context.key, context.now).await.map_err(|error| match error {
        AttestError::Refused(error) => AttestError::Refused(said(error)),
        AttestError::Unavailable(error) => AttestError::Unavailable(said(error)),
    })
}

fn proves_instance(caller: &CallerIdentity, instance: &InstanceIdentity) -> Result<(), AttestError> {
    match &caller.principal {
        Principal::Instance { id } if *id == instance.instance_id => Ok(()),
        Principal::Instance { id } => Err(AttestError::Refused(format!(
            "the identity document is of instance {}, but the caller is instance {id}",
            instance.instance_id
        ))),
        Principal::Role { name, .. } => Err(AttestError::Refused(format!(
            "the caller that should be instance {} is role {name:?}; the instance's own credentials are at identity-credentials/ec2/security-credentials/ec2-instance",
            instance.instance_id
        ))),
    }
}

fn role_of(caller: &CallerIdentity, instance: &InstanceIdentity) -> Result<Proven<String>, AttestError> {
    match &caller.principal {
        Principal::Role { name, session } if *session == instance.instance_id => Ok(Proven::by_attestor(name.clone())),
        Principal::Role { name, session } => Err(AttestError::Refused(format!(
            "the identity document is of instance {}, but the session of role {name:?} is called {session:?}: it isn't the instance profile's",
            instance.instance_id
        ))),
        Principal::Instance { id } => {
            Err(AttestError::Refused(format!("the caller that should be a role is instance {id} itself")))
        }
    }
}
