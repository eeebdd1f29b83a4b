/// One issuer of `workloads.authentication.jwt.issuers`.
#[derive(Debug, Clone, PartialEq)]
pub struct Issuer {
    /// Equals the token's `iss` exactly.
    pub issuer: String,
    pub short_name: String,
    pub keys: KeySource,
    /// `tokenFields.attributes.jsonPath`, in RFC 9535 form (`$...`).
    pub attributes: Option<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub enum KeySource {
    /// A JWKS document.
    Inline(String),
    Uri(String),
    /// OpenID Connect Discovery at the issuer.
    Discovery,
}
