//! Values as Python prints them: str(), repr() and json.dumps(), which is what a template written for Jinja2 expects.

use indexmap::IndexMap;
use minijinja::value::{Enumerator, Kwargs, Object, ObjectExt, ObjectRepr, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::Value as Json;
use std::fmt::{self, Write};
use std::sync::Arc;

/// JSON as template values. Lists and objects are types of our own, so that minijinja, wherever it needs one as text
/// (`~`, upper, join), takes Python's repr.
pub fn from_json(json: Json) -> Value {
    match json {
        Json::Array(items) => Value::from_object(PyList(items.into_iter().map(from_json).collect())),
        Json::Object(map) => Value::from_object(PyDict(map.into_iter().map(|(key, v)| (key, from_json(v))).collect())),
        scalar => Value::from_serialize(scalar),
    }
}

#[derive(Debug)]
struct PyList(Vec<Value>);

impl Object for PyList {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Seq
    }
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get(key.as_usize()?).cloned()
    }
    fn enumerate(self: &Arc<Self>) -> Enumerator {
        Enumerator::Seq(self.0.len())
    }
    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&py_str(&Value::from_dyn_object(self.clone())))
    }
}

#[derive(Debug)]
struct PyDict(IndexMap<String, Value>);

impl Object for PyDict {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get(key.as_str()?).cloned()
    }
    fn get_value_by_str(self: &Arc<Self>, key: &str) -> Option<Value> {
        self.0.get(key).cloned()
    }
    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.mapped_enumerator(|dict| Box::new(dict.0.keys().map(|key| Value::from(key.as_str()))))
    }
    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.0.len())
    }
    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&py_str(&Value::from_dyn_object(self.clone())))
    }
}

/// str(value), and "" for an undefined one, as Jinja2 prints it.
pub fn py_str(value: &Value) -> String {
    match value.kind() {
        ValueKind::String => value.as_str().unwrap_or_default().to_string(),
        ValueKind::Undefined => String::new(),
        _ => {
            let mut out = String::new();
            repr(value, &mut out);
            out
        }
    }
}

fn repr(value: &Value, out: &mut String) {
    match value.kind() {
        ValueKind::String => repr_str(value.as_str().unwrap_or_default(), out),
        ValueKind::Number => number(value, out),
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (index, item) in value.try_iter().into_iter().flatten().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(&item, out);
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, (key, item)) in pairs(value).into_iter().enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(&key, out);
                out.push_str(": ");
                repr(&item, out);
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}"); // minijinja prints None, True and False as Python does
        }
    }
}

fn pairs(map: &Value) -> Vec<(Value, Value)> {
    map.as_object().and_then(|object| object.try_iter_pairs().map(|pairs| pairs.collect())).unwrap_or_default()
}

fn repr_str(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ if c == quote => {
                out.push('\\');
                out.push(c);
            }
            _ if printable(c) => out.push(c),
            _ => {
                let code = c as u32;
                let _ = match code {
                    0..=0xFF => write!(out, "\\x{code:02x}"),
                    0x100..=0xFFFF => write!(out, "\\u{code:04x}"),
                    _ => write!(out, "\\U{code:08x}"),
                };
            }
        }
    }
    out.push(quote);
}

/// str.isprintable for one character. Rust's escape_debug knows the same classes; it also escapes a combining mark that
/// starts a string, hence the letter in front, and quotes and backslashes, which the caller has already dealt with.
fn printable(c: char) -> bool {
    let mut pair = String::from("a");
    pair.push(c);
    matches!(c, '\'' | '"') || pair.escape_debug().eq(pair.chars())
}

fn number(value: &Value, out: &mut String) {
    if value.is_integer() {
        let _ = write!(out, "{value}");
    } else {
        float(f64::try_from(value.clone()).unwrap_or(f64::NAN), "nan", "inf", out);
    }
}

/// float.__repr__: the shortest digits that read back, positional from 1e-4 up to below 1e16.
fn float(x: f64, nan: &str, infinity: &str, out: &mut String) {
    if x.is_nan() {
        return out.push_str(nan);
    }
    if x.is_sign_negative() {
        out.push('-');
    }
    if x.is_infinite() {
        return out.push_str(infinity);
    }
    let scientific = format!("{:e}", x.abs()); // "1.2345e-7"
    let (mantissa, exponent) = scientific.split_once('e').expect("LowerExp prints an exponent");
    let exponent: i32 = exponent.parse().expect("LowerExp prints an integer exponent");
    if (-4..16).contains(&exponent) {
        let fixed = format!("{}", x.abs()); // Display never uses an exponent
        out.push_str(&fixed);
        if !fixed.contains('.') {
            out.push_str(".0");
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        let _ = write!(out, "{mantissa}e{sign}{:02}", exponent.abs());
    }
}

/// tojson as transformers defines it: json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False).
pub fn tojson(value: &Value, args: Kwargs) -> Result<String, Error> {
    let ensure_ascii = args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = args.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let indent = match args.get::<Option<Value>>("indent")? {
        Some(text) if text.kind() == ValueKind::String => text.as_str().map(str::to_string),
        Some(width) if width.kind() == ValueKind::Number => {
            Some(" ".repeat(usize::try_from(width).unwrap_or(0).min(INDENT_MAX)))
        }
        _ => None,
    };
    let separators = match args.get::<Option<Vec<String>>>("separators")? {
        Some(pair) if pair.len() == 2 => (pair[0].clone(), pair[1].clone()),
        Some(_) => return Err(Error::new(ErrorKind::InvalidOperation, "separators takes two strings")),
        None => (if indent.is_some() { "," } else { ", " }.to_string(), ": ".to_string()),
    };
    args.assert_all_used()?;
    let mut out = String::new();
    Dumper { ensure_ascii, sort_keys, indent, separators }.dump(value, 0, &mut out)?;
    Ok(out)
}

/// A wider indent is no formatting any more: it would only multiply the output.
const INDENT_MAX: usize = 64;
/// Deeper than any JSON that can come in (serde_json stops at 128); bounds what a template can build itself.
const DEPTH_MAX: usize = 256;

struct Dumper {
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<String>,
    separators: (String, String),
}

impl Dumper {
    fn dump(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        if depth > DEPTH_MAX {
            return Err(Error::new(ErrorKind::InvalidOperation, "tojson: the value nests too deeply"));
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => json_number(value, out),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), out),
            ValueKind::Seq => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.group('[', ']', &items, depth, out, |item, out| self.dump(item, depth + 1, out))?;
            }
            ValueKind::Map => {
                let mut items = Vec::new();
                for (key, item) in pairs(value) {
                    items.push((key_text(&key)?, item));
                }
                if self.sort_keys {
                    items.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.group('{', '}', &items, depth, out, |(key, item), out| {
                    self.string(key, out);
                    out.push_str(&self.separators.1);
                    self.dump(item, depth + 1, out)
                })?;
            }
            kind => {
                let message = format!("Object of type {kind} is not JSON serializable");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        }
        Ok(())
    }

    fn group<T>(
        &self, open: char, close: char, items: &[T], depth: usize, out: &mut String,
        mut each: impl FnMut(&T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(&self.separators.0);
            }
            self.new_line(depth + 1, out);
            each(item, out)?;
        }
        if !items.is_empty() {
            self.new_line(depth, out);
        }
        out.push(close);
        Ok(())
    }

    fn new_line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.push_str(&indent.repeat(depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                ' '..='~' => out.push(c),
                _ if c >= ' ' && !self.ensure_ascii => out.push(c),
                _ => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
            }
        }
        out.push('"');
    }
}

fn json_number(value: &Value, out: &mut String) {
    if value.is_integer() {
        let _ = write!(out, "{value}");
    } else {
        float(f64::try_from(value.clone()).unwrap_or(f64::NAN), "NaN", "Infinity", out);
    }
}

fn key_text(key: &Value) -> Result<String, Error> {
    let mut text = String::new();
    match key.kind() {
        ValueKind::String => text.push_str(key.as_str().unwrap_or_default()),
        ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if key.is_true() { "true" } else { "false" }),
        ValueKind::Number => json_number(key, &mut text),
        kind => {
            let message = format!("keys must be str, int, float, bool or None, not {kind}");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    }
    Ok(text)
}
