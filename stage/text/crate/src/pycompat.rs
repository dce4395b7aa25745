//! Methods, filters and tests where Jinja2 does what Python does and minijinja (or its contrib pycompat) something else:
//! which characters are white space, character indices instead of byte indices, split without a separator, and what
//! counts as a sequence. Everything else falls through to pycompat.

use minijinja::value::{Value, ValueKind, from_args};
use minijinja::{Environment, Error, State};

pub fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.add_filter("trim", |text: &Value, chars: Option<&str>| -> Value {
        strip(&crate::pyvalue::py_str(text), chars, true, true).into()
    });
    environment.add_filter("string", |value: &Value| crate::pyvalue::py_str(value));
    for name in ["length", "count"] {
        environment.add_filter(name, |value: &Value| -> Result<usize, Error> {
            // An undefined value has length 0 in Jinja2.
            let length = if value.is_undefined() { Some(0) } else { value.len() };
            length.ok_or_else(|| {
                let message = format!("object of type {} has no len()", value.kind());
                Error::new(minijinja::ErrorKind::InvalidOperation, message)
            })
        });
    }
    environment.add_filter("tojson", |value: &Value, args| crate::pyvalue::tojson(value, args));
    environment.add_test("iterable", |value: &Value| {
        use ValueKind::*;
        matches!(value.kind(), Undefined | String | Bytes | Seq | Map | Iterable)
    });
    // jinja2.tests.test_sequence: anything with a length and an item operator; Undefined has both.
    environment.add_test("sequence", |value: &Value| {
        use ValueKind::*;
        matches!(value.kind(), Undefined | String | Bytes | Seq | Map)
    });
    // isinstance(True, numbers.Number)
    environment.add_test("number", |value: &Value| matches!(value.kind(), ValueKind::Number | ValueKind::Bool));
}

fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let (ValueKind::String, Some(text)) = (value.kind(), value.as_str()) {
        if let Some(result) = string_method(text, name, args) {
            return result;
        }
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}

fn string_method(text: &str, name: &str, args: &[Value]) -> Option<Result<Value, Error>> {
    Some(match name {
        "strip" => from_args(args).map(|(chars,)| strip(text, chars, true, true).into()),
        "lstrip" => from_args(args).map(|(chars,)| strip(text, chars, true, false).into()),
        "rstrip" => from_args(args).map(|(chars,)| strip(text, chars, false, true).into()),
        "split" => from_args(args).and_then(|(separator, limit)| split(text, separator, limit)),
        "rsplit" => from_args(args).and_then(|(separator, limit)| rsplit(text, separator, limit)),
        "splitlines" => from_args(args).map(|(keep_ends,): (Option<bool>,)| splitlines(text, keep_ends == Some(true))),
        "find" => from_args(args).map(|(part,): (&str,)| index(text, text.find(part))),
        "rfind" => from_args(args).map(|(part,): (&str,)| index(text, text.rfind(part))),
        "removeprefix" => from_args(args).map(|(part,): (&str,)| text.strip_prefix(part).unwrap_or(text).into()),
        "removesuffix" => from_args(args).map(|(part,): (&str,)| text.strip_suffix(part).unwrap_or(text).into()),
        "partition" => from_args(args).and_then(|(separator,): (&str,)| partition(text, separator)),
        "isspace" => from_args(args).map(|()| (!text.is_empty() && text.chars().all(is_space)).into()),
        "isdigit" | "isnumeric" => {
            from_args(args).map(|()| (!text.is_empty() && text.chars().all(char::is_numeric)).into())
        }
        "isalpha" => from_args(args).map(|()| (!text.is_empty() && text.chars().all(char::is_alphabetic)).into()),
        "isalnum" => from_args(args).map(|()| (!text.is_empty() && text.chars().all(char::is_alphanumeric)).into()),
        "isupper" => from_args(args).map(|()| cased(text, char::is_uppercase, char::is_lowercase)),
        "islower" => from_args(args).map(|()| cased(text, char::is_lowercase, char::is_uppercase)),
        _ => return None,
    })
}

/// str.isspace for one character: Unicode white space and the four ASCII separators that Unicode leaves out.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn strip<'a>(text: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let drop = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let text = if start { text.trim_start_matches(drop) } else { text };
    if end { text.trim_end_matches(drop) } else { text }
}

fn empty_separator() -> Error {
    Error::new(minijinja::ErrorKind::InvalidOperation, "empty separator")
}

/// Negative and missing limits mean no limit.
fn limit_of(limit: Option<i64>) -> usize {
    limit.and_then(|limit| usize::try_from(limit).ok()).map_or(usize::MAX, |limit| limit.saturating_add(1))
}

fn split(text: &str, separator: Option<&str>, limit: Option<i64>) -> Result<Value, Error> {
    match separator {
        Some("") => Err(empty_separator()),
        Some(separator) => Ok(text.splitn(limit_of(limit), separator).map(Value::from).collect()),
        None => {
            // Runs of white space separate; the last part, when the limit is reached, keeps its trailing white space.
            let (mut parts, mut rest) = (Vec::new(), text.trim_start_matches(is_space));
            while !rest.is_empty() {
                let end = if parts.len() + 1 >= limit_of(limit) { None } else { rest.find(is_space) };
                parts.push(Value::from(&rest[..end.unwrap_or(rest.len())]));
                rest = rest[end.unwrap_or(rest.len())..].trim_start_matches(is_space);
            }
            Ok(parts.into())
        }
    }
}

fn rsplit(text: &str, separator: Option<&str>, limit: Option<i64>) -> Result<Value, Error> {
    let mut parts: Vec<Value> = match separator {
        Some("") => return Err(empty_separator()),
        Some(separator) => text.rsplitn(limit_of(limit), separator).map(Value::from).collect(),
        None => {
            let (mut parts, mut rest) = (Vec::new(), text.trim_end_matches(is_space));
            while !rest.is_empty() {
                let found = if parts.len() + 1 >= limit_of(limit) {
                    None
                } else {
                    rest.char_indices().rfind(|(_, c)| is_space(*c))
                };
                let start = found.map_or(0, |(at, c)| at + c.len_utf8());
                parts.push(Value::from(&rest[start..]));
                rest = rest[..start].trim_end_matches(is_space);
            }
            parts
        }
    };
    parts.reverse();
    Ok(parts.into())
}

fn splitlines(text: &str, keep_ends: bool) -> Value {
    let is_end = |c: char| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let (mut lines, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let end = rest.find(is_end).unwrap_or(rest.len());
        let after = &rest[end..];
        let width = if after.starts_with("\r\n") { 2 } else { after.chars().next().map_or(0, char::len_utf8) };
        lines.push(Value::from(&rest[..if keep_ends { end + width } else { end }]));
        rest = &rest[end + width..];
    }
    lines.into()
}

fn partition(text: &str, separator: &str) -> Result<Value, Error> {
    if separator.is_empty() {
        return Err(empty_separator());
    }
    let (head, middle, tail) =
        text.split_once(separator).map_or((text, "", ""), |(head, tail)| (head, separator, tail));
    Ok(vec![Value::from(head), Value::from(middle), Value::from(tail)].into())
}

/// A byte offset as Python's character index, or -1.
fn index(text: &str, offset: Option<usize>) -> Value {
    offset.map_or(-1, |offset| text[..offset].chars().count() as i64).into()
}

fn cased(text: &str, wanted: fn(char) -> bool, other: fn(char) -> bool) -> Value {
    (text.chars().any(wanted) && !text.chars().any(other)).into()
}
