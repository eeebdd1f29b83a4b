//! Scenarios across agent, plane and Envoy; nothing but tests lives here.
