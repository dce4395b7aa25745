//! A checkpoint's chat template, rendered as transformers' apply_chat_template(tokenize=False) renders it.

use crate::ffi::{Failure, exhausted, invalid, utf8};
use crate::pycompat;
use crate::pyvalue::{from_json, py_str};
use minijinja::{AutoEscape, Environment, Error, ErrorKind};
use serde_json::{Map, Value as Json};
use std::io;

/// Instructions of one rendering. A 1,000-message conversation takes about 10^5; this is some seconds of work.
const FUEL: u64 = 50_000_000;
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];
/// transformers' marker for where a continued final message ends; it contains no character a template changes.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

pub struct ChatTemplate {
    environment: Environment<'static>,
    globals: Map<String, Json>,
    sources: Vec<(String, String)>, // (name, source)
}

/// raise_exception()'s message, carried through the engine's error so that the caller sees it alone.
#[derive(Debug)]
struct Raised(String);
impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}
impl std::error::Error for Raised {}

impl ChatTemplate {
    pub fn new(jinja: Option<&[u8]>, legacy: Option<&[u8]>, config: Option<&[u8]>) -> Result<Self, Failure> {
        let config = config.map(|text| object(text, "tokenizer_config.json")).transpose()?.unwrap_or_default();
        let sources = if let Some(jinja) = jinja {
            vec![("default".to_string(), utf8(jinja, "chat_template.jinja")?.to_string())]
        } else if let Some(legacy) = legacy {
            named_sources(object(legacy, "chat_template.json")?.get("chat_template"), "chat_template.json")?
        } else {
            named_sources(config.get("chat_template"), "tokenizer_config.json")?
        };
        let mut globals = Map::new();
        for name in SPECIAL_TOKENS {
            let token = config.get(name).and_then(|token| token.as_str().or_else(|| token.get("content")?.as_str()));
            if let Some(token) = token {
                globals.insert(name.to_string(), token.into());
            }
        }

        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_formatter(|out, _, value| match value.as_str() {
            Some(text) => out.write_str(text).map_err(Error::from),
            None => out.write_str(&py_str(value)).map_err(Error::from),
        });
        pycompat::install(&mut environment);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
        });
        environment.add_function("strftime_now", |format: &str| strftime_now(format));
        for (name, source) in &sources {
            environment
                .add_template_owned(name.clone(), prepare(source))
                .map_err(|error| invalid(format!("chat template: {error:#}")))?;
        }
        Ok(Self { environment, globals, sources })
    }

    pub fn render(&self, context: &[u8], size_max: usize) -> Result<Vec<u8>, Failure> {
        let mut given = object(context, "the template context")?;
        if !given.get("messages").and_then(Json::as_array).is_some_and(|messages| !messages.is_empty()) {
            return Err(invalid("messages must be a list with at least one message"));
        }
        let continued = self.start_continuation(&mut given)?;
        let has_tools = given.get("tools").is_some_and(|tools| !tools.is_null());
        let name =
            if has_tools && self.sources.iter().any(|(name, _)| name == "tool_use") { "tool_use" } else { "default" };

        let mut names = self.globals.clone();
        names.insert("tools".into(), Json::Null);
        names.insert("documents".into(), Json::Null);
        names.insert("add_generation_prompt".into(), false.into());
        names.extend(given);
        let template = self.environment.get_template(name).map_err(invalid)?;
        let mut out = Bounded { bytes: Vec::new(), size_max, full: false };
        match template.render_captured_to(from_json(Json::Object(names)), &mut out).map(drop) {
            Ok(()) => {}
            Err(_) if out.full => return Err(exhausted(format!("the prompt is longer than {size_max} bytes"))),
            Err(error) => return Err(failure(&error)),
        }
        match continued {
            Some(text) => finish_continuation(out.bytes, &text),
            None => Ok(out.bytes),
        }
    }

    /// continue_final_message (true, or the name of the field to continue): marks where the final message ends, and
    /// gives the text that is to be continued. Mirrors transformers.utils.chat_template_utils.render_jinja_template.
    fn start_continuation(&self, given: &mut Map<String, Json>) -> Result<Option<String>, Failure> {
        let field = match given.shift_remove("continue_final_message") {
            Some(Json::Bool(true)) => "content".to_string(),
            Some(Json::String(field)) if !field.is_empty() => field,
            _ => return Ok(None),
        };
        if given.get("add_generation_prompt") == Some(&Json::Bool(true)) {
            return Err(invalid("continue_final_message and add_generation_prompt are not compatible"));
        }
        if !self.sources.iter().any(|(_, source)| source.contains(&field)) {
            return Err(invalid(format!("continue_final_message: the chat template has no field \"{field}\"")));
        }
        let last = given.get_mut("messages").and_then(Json::as_array_mut).and_then(|messages| messages.last_mut());
        let text = match last.and_then(|message| message.get_mut(&field)) {
            Some(Json::String(text)) => Some(text),
            Some(Json::Array(parts)) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
                Some(Json::String(text)) => Some(text),
                _ => None,
            }),
            _ => None,
        };
        let Some(text) = text else {
            return Err(invalid(format!("continue_final_message: the final message has no text in \"{field}\"")));
        };
        let original = text.clone();
        text.push_str(CONTINUE_TAG);
        Ok(Some(original))
    }
}

fn finish_continuation(rendered: Vec<u8>, continued: &str) -> Result<Vec<u8>, Failure> {
    let mut rendered = String::from_utf8(rendered).map_err(invalid)?;
    match rendered.rfind(CONTINUE_TAG.trim_end()) {
        Some(at) if rendered.contains(continued.trim()) => {
            let spaced = rendered[at..].starts_with(CONTINUE_TAG);
            rendered.truncate(at);
            if !spaced {
                rendered.truncate(rendered.trim_end().len()); // the template trims; then the tag's own space is lost
            }
            Ok(rendered.into_bytes())
        }
        _ => Err(invalid("continue_final_message: the chat template drops the final message")),
    }
}

/// The innermost raise_exception() message if there is one, else the engine's error with its place, never the sources.
fn failure(error: &Error) -> Failure {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(raised) = current.downcast_ref::<Raised>() {
            return invalid(&raised.0);
        }
        cause = current.source();
    }
    match error.kind() {
        ErrorKind::OutOfFuel => exhausted("the chat template ran too long"),
        _ => invalid(format!("chat template: {error}")),
    }
}

fn object(text: &[u8], what: &str) -> Result<Map<String, Json>, Failure> {
    serde_json::from_slice(text).map_err(|error| invalid(format!("{what} is not a JSON object: {error}")))
}

fn named_sources(value: Option<&Json>, file: &str) -> Result<Vec<(String, String)>, Failure> {
    let sources: Option<Vec<(String, String)>> = match value {
        Some(Json::String(source)) => Some(vec![("default".into(), source.clone())]),
        Some(Json::Array(list)) => list
            .iter()
            .map(|entry| Some((entry.get("name")?.as_str()?.to_string(), entry.get("template")?.as_str()?.to_string())))
            .collect(),
        _ => None,
    };
    match sources {
        Some(sources) if sources.iter().any(|(name, _)| name == "default") => Ok(sources),
        _ => Err(invalid(format!("{file} has no usable chat_template"))),
    }
}

/// What Jinja2 does before parsing and minijinja does not: newlines become "\n". And transformers' own
/// {% generation %} ... {% endgeneration %}, which only marks a span and opens a scope, becomes {% with %}.
fn prepare(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let (mut out, mut rest) = (String::with_capacity(source.len()), source.as_str());
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let body = tag[2..].trim_start_matches(['-', '+']).trim_start();
        let word = body.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("");
        let after = body[word.len()..].trim_start().trim_start_matches(['-', '+']);
        let replacement = match word {
            "generation" => Some("with"),
            "endgeneration" => Some("endwith"),
            _ => None,
        };
        match replacement {
            Some(replacement) if after.starts_with("%}") => {
                out.push_str(&tag[..tag.len() - body.len()]);
                out.push_str(replacement);
                rest = &body[word.len()..];
            }
            _ => {
                out.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    out.push_str(rest);
    out
}

/// datetime.now().strftime(format): local time; %f is microseconds, %z and %Z are empty for a naive time.
fn strftime_now(format: &str) -> Result<String, Error> {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let mut plain = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        match (c, if c == '%' { chars.next() } else { None }) {
            ('%', Some('f')) => plain.push_str(&format!("{:06}", since.subsec_micros())),
            ('%', Some('z' | 'Z')) => {}
            ('%', Some(directive)) => plain.extend(['%', directive]),
            _ => plain.push(c),
        }
    }
    let bad = || Error::new(ErrorKind::InvalidOperation, "strftime_now: the format is not usable");
    let plain = std::ffi::CString::new(plain).map_err(|_| bad())?;
    if plain.as_bytes().is_empty() {
        return Ok(String::new());
    }
    let mut buffer = vec![0u8; 4096];
    let seconds = since.as_secs() as libc::time_t;
    // SAFETY: `tm` is written by localtime_r before strftime reads it; strftime writes at most buffer.len() bytes.
    let written = unsafe {
        let mut tm: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&seconds, &mut tm).is_null() {
            return Err(bad());
        }
        libc::strftime(buffer.as_mut_ptr().cast(), buffer.len(), plain.as_ptr(), &tm)
    };
    buffer.truncate(written);
    String::from_utf8(buffer).map_err(|_| bad())
}

struct Bounded {
    bytes: Vec<u8>,
    size_max: usize,
    full: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + data.len() > self.size_max {
            self.full = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.bytes.extend_from_slice(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
