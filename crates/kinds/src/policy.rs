//! `authorization.onboarding.tetrate.io/v1alpha1` OnboardingPolicy, read into [`onboarding_core::policy::Policy`].
