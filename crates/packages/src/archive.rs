//! Whether a file is a whole package: that it begins as one, and that it is as long as it says itself.
//! What is in it is for `dpkg` and `rpm` to judge.

use crate::name::Format;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Members of the `ar` archive that a .deb is (deb(5) has three, signatures add a few).
const MOST_MEMBERS: usize = 64;
/// Entries of an RPM's signature header; RPM itself takes no more than 65,535.
const MOST_ENTRIES: u32 = 4096;
/// Bytes of an RPM's signature header's data; RPM itself takes no more.
const MOST_DATA: u32 = 64 << 20;

/// Why a file isn't a whole package.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error("it does not begin as a {} package", .0.name())]
    Other(Format),
    #[error("it is {there} bytes long and says itself that it has {said}: it is being written, or was cut off")]
    Length { there: u64, said: u64 },
    #[error("reading it failed: {0}")]
    Read(#[from] io::Error),
}

/// `length`: the file's.
///
/// # Errors
/// It isn't, or can't be read.
pub fn check(file: &File, format: Format, length: u64) -> Result<(), Fault> {
    match format {
        Format::Deb => debian(file, length),
        Format::Rpm => rpm(file, length),
    }
}

/// deb(5): an `ar` archive whose first member is `debian-binary`. Its members fill it.
fn debian(file: &File, length: u64) -> Result<(), Fault> {
    const GLOBAL: u64 = 8;
    const HEADER: u64 = 60;
    let mut offset = GLOBAL;
    let start: [u8; 21] = at(file, 0, length, Format::Deb)?;
    if &start != b"!<arch>\ndebian-binary" {
        return Err(Fault::Other(Format::Deb));
    }
    for _ in 0..MOST_MEMBERS {
        if offset == length {
            return Ok(());
        }
        if offset.saturating_add(HEADER) > length {
            return Err(Fault::Length { there: length, said: offset.saturating_add(HEADER) });
        }
        let header: [u8; HEADER as usize] = at(file, offset, length, Format::Deb)?;
        let size = str::from_utf8(&header[48..58]).ok().and_then(|digits| digits.trim_end().parse::<u64>().ok());
        let (Some(size), b"`\n") = (size, &header[58..]) else { return Err(Fault::Other(Format::Deb)) };
        // At most ten digits, so that nothing overflows.
        let end = offset + HEADER + size;
        if end > length {
            return Err(Fault::Length { there: length, said: end });
        }
        // A member of odd size is followed by a byte; some writers leave it out at the end.
        offset = (end + size % 2).min(length);
    }
    Err(Fault::Other(Format::Deb))
}

/// RPM's lead, then the signature header, which has the size of all that follows it.
fn rpm(file: &File, length: u64) -> Result<(), Fault> {
    const LEAD: u64 = 96;
    const INTRO: u64 = 16;
    const ENTRY: u64 = 16;
    /// `RPMSIGTAG_LONGSIZE` and `RPMSIGTAG_SIZE`, each with its type (INT64, INT32) and its bytes.
    const SIZES: [(u32, u32, u64); 2] = [(270, 5, 8), (1000, 4, 4)];
    let other = || Fault::Other(Format::Rpm);
    let magic: [u8; 4] = at(file, 0, length, Format::Rpm)?;
    let intro: [u8; INTRO as usize] = at(file, LEAD, length, Format::Rpm)?;
    if magic != [0xed, 0xab, 0xee, 0xdb] || intro[..4] != [0x8e, 0xad, 0xe8, 0x01] {
        return Err(other());
    }
    let (entries, data) = (number(&intro[8..12]), number(&intro[12..16]));
    if entries > MOST_ENTRIES || data > MOST_DATA {
        return Err(other());
    }
    let store = LEAD + INTRO + ENTRY * u64::from(entries);
    // The header proper begins at a multiple of eight.
    let end = (store + u64::from(data)).next_multiple_of(8);
    let mut said = end;
    for index in 0..u64::from(entries) {
        let entry: [u8; ENTRY as usize] = at(file, LEAD + INTRO + ENTRY * index, length, Format::Rpm)?;
        let (tag, kind, offset) = (number(&entry[..4]), number(&entry[4..8]), number(&entry[8..12]));
        let Some((_, _, bytes)) = SIZES.iter().find(|size| (size.0, size.1) == (tag, kind)) else { continue };
        if u64::from(offset) + bytes > u64::from(data) {
            return Err(other());
        }
        let at_most: u64 = match bytes {
            8 => u64::from_be_bytes(at(file, store + u64::from(offset), length, Format::Rpm)?),
            _ => u32::from_be_bytes(at(file, store + u64::from(offset), length, Format::Rpm)?).into(),
        };
        said = end.saturating_add(at_most);
    }
    if length < said { Err(Fault::Length { there: length, said }) } else { Ok(()) }
}

fn number(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0, |number, byte| number << 8 | u32::from(*byte))
}

/// What is too short doesn't begin as a package.
fn at<const N: usize>(file: &File, offset: u64, length: u64, format: Format) -> Result<[u8; N], Fault> {
    if offset.saturating_add(N as u64) > length {
        return Err(Fault::Other(format));
    }
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, offset)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn judged(bytes: &[u8], format: Format) -> String {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        check(&file, format, bytes.len() as u64).map_or_else(|fault| fault.to_string(), |()| "whole".to_owned())
    }

    fn deb(data: &[u8]) -> Vec<u8> {
        let mut all = b"!<arch>\n".to_vec();
        for (name, content) in [("debian-binary", b"2.0\n".as_slice()), ("control.tar", b"abc"), ("data.tar", data)] {
            writeln!(all, "{name:<16}{:<12}{:<6}{:<6}{:<8}{:<10}`", 0, 0, 0, 100_644, content.len()).unwrap();
            all.extend(content);
            if content.len() % 2 == 1 {
                all.push(b'\n');
            }
        }
        all
    }

    fn rpm(size: (u32, u32, &[u8]), rest: &[u8]) -> Vec<u8> {
        let mut all = vec![0xed, 0xab, 0xee, 0xdb];
        all.resize(96, 0);
        all.extend([0x8e, 0xad, 0xe8, 1, 0, 0, 0, 0, 0, 0, 0, 1]);
        all.extend(u32::try_from(size.2.len()).unwrap().to_be_bytes());
        for number in [size.0, size.1, 0, 1] {
            all.extend(number.to_be_bytes());
        }
        all.extend(size.2);
        all.resize(all.len().next_multiple_of(8), 0);
        all.extend(rest);
        all
    }

    #[test]
    fn a_deb_is_as_long_as_its_members() {
        let whole = deb(b"12345");
        assert_eq!(judged(&whole, Format::Deb), "whole");
        assert_eq!(judged(&whole[..whole.len() - 1], Format::Deb), "whole", "the last filling byte may be missing");
        for end in [whole.len() - 2, 100, 70] {
            let said = judged(&whole[..end], Format::Deb);
            assert!(said.contains("being written, or was cut off"), "{end}: {said}");
        }
        let mut longer = whole.clone();
        longer.push(0);
        assert!(judged(&longer, Format::Deb).contains("cut off"));
        for other in [b"".as_slice(), b"!<arch>\n", b"!<arch>\nother-binary     0", &[0; 200]] {
            assert_eq!(judged(other, Format::Deb), "it does not begin as a deb package");
        }
        let mut broken = whole;
        broken[8 + 48] = b'-';
        assert_eq!(judged(&broken, Format::Deb), "it does not begin as a deb package");
    }

    #[test]
    fn an_rpm_is_as_long_as_its_signature_header_says() {
        for size in [(1000, 4, 5_u32.to_be_bytes().as_slice()), (270, 5, &5_u64.to_be_bytes())] {
            let whole = rpm(size, b"12345");
            assert_eq!(judged(&whole, Format::Rpm), "whole");
            assert!(judged(&whole[..whole.len() - 1], Format::Rpm).contains("cut off"));
            assert_eq!(judged(&whole[..100], Format::Rpm), "it does not begin as a rpm package");
        }
        // One that doesn't say.
        assert_eq!(judged(&rpm((1, 4, &[0; 4]), b""), Format::Rpm), "whole");
        // The size lies outside of the header, or no number fits there.
        assert!(judged(&rpm((1000, 4, &[0; 3]), b"1"), Format::Rpm).contains("does not begin"));
        assert!(judged(&rpm((270, 5, &u64::MAX.to_be_bytes()), b"1"), Format::Rpm).contains("cut off"));
        assert!(judged(&deb(b"1"), Format::Rpm).contains("does not begin"));
    }
}
