//! Grammar-constrained decoding: llguidance over this tokenizer's bytes.

use crate::ffi::{Failure, exhausted, internal, invalid, utf8};
use crate::tokenizer::Tokenizer;
use llguidance::api::{StopReason, TopLevelGrammar};
use llguidance::earley::SlicedBiasComputer;
use llguidance::{Matcher, ParserFactory};
use std::sync::Arc;
use toktrie::{InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv};

/// Bounds on what a request may ask for; llguidance bounds the rest (grammar size, lexer states, work per mask) itself.
const TEXT_BYTES_MAX: usize = 1 << 20;
/// Recursive-descent parsers (Lark, regex) go this deep; a megabyte of "((((" would otherwise overflow a thread's stack.
const NESTING_MAX: usize = 128;
/// Between two JSON tokens: enough for a line break and any indentation that people print. Without a bound a model that
/// falls into blanks stays there until its length limit, and the answer is no JSON.
const WHITESPACE: &str = r"[ \n\r\t]{1,32}";

struct Environment {
    trie: TokTrie,
    tokenizer: Arc<tokenizers::Tokenizer>,
}

impl TokenizerEnv for Environment {
    fn tok_trie(&self) -> &TokTrie {
        &self.trie
    }
    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.trie.tokenize_with_greedy_fallback(bytes, |text| match self.tokenizer.encode_fast(text, false) {
            Ok(encoding) => encoding.get_ids().to_vec(),
            Err(_) => self.trie.greedy_tokenize(text.as_bytes()),
        })
    }
}

pub struct Compiler {
    factory: ParserFactory,
    tokens: i32,
}

impl Compiler {
    pub fn new(tokenizer: &Tokenizer, vocab_size: i32, eos: &[i32]) -> Result<Self, Failure> {
        if vocab_size < tokenizer.size() {
            return Err(invalid(format!("{vocab_size} logit columns, but {} tokens", tokenizer.size())));
        }
        if eos.is_empty() || eos.iter().any(|id| tokenizer.entry(*id).is_none()) {
            return Err(invalid("an end-of-sequence id is missing or has no token"));
        }
        let words: Vec<Vec<u8>> = (0..vocab_size)
            .map(|id| match tokenizer.entry(id) {
                // A marked word can only be reached by naming it in a grammar, never by its text: inside a JSON string
                // "<tool_call>" must be spelt by ordinary tokens, or the server would take it for the control token.
                Some(entry) if entry.added => marked(entry.name.as_bytes()),
                Some(entry) => entry.bytes.clone(),
                None => Vec::new(), // padding columns: in no mask
            })
            .collect();
        let eos: Vec<TokenId> = eos.iter().map(|id| *id as TokenId).collect();
        let trie = TokTrie::from(&TokRxInfo::new(vocab_size as u32, eos[0]), &words).with_eos_tokens(&eos);
        let environment: TokEnv = Arc::new(Environment { trie, tokenizer: tokenizer.inner.clone() });
        let mut factory = ParserFactory::new(
            &environment,
            InferenceCapabilities { ff_tokens: false, ..Default::default() },
            &SlicedBiasComputer::general_slices(),
        )
        .map_err(internal)?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false; // its errors would quote a user's text
        Ok(Self { factory, tokens: tokenizer.size() })
    }

    pub fn compile(&self, grammar: i32, text: &[u8]) -> Result<Constraint, Failure> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(exhausted(format!(
                "the grammar has {} bytes, at most {TEXT_BYTES_MAX} are allowed",
                text.len()
            )));
        }
        let text = utf8(text, "the grammar")?;
        let grammar = match grammar {
            0 => {
                let mut schema: serde_json::Value =
                    serde_json::from_str(text).map_err(|e| invalid(format!("the schema is not JSON: {e}")))?;
                if let Some(object) = schema.as_object_mut() {
                    object.entry("x-guidance").or_insert_with(|| serde_json::json!({ "whitespace_pattern": WHITESPACE }));
                }
                TopLevelGrammar::from_json_schema(schema)
            }
            1 => {
                check_nesting(text, false)?;
                TopLevelGrammar::from_regex(text)
            }
            2 => {
                check_nesting(text, true)?;
                TopLevelGrammar::from_lark(text.to_string())
            }
            other => return Err(internal(format!("grammar kind {other}"))),
        };
        let parser = self.factory.create_parser(grammar).map_err(|error| invalid(format!("{error:#}")))?;
        let matcher = Matcher::new(Ok(parser));
        if let Some(error) = matcher.get_error() {
            return Err(invalid(error));
        }
        // The lexer is built lazily, so a grammar that is too large for its bounds shows at its first token: refused here,
        // on the thread of the one who asks, with a message, not by the thread that serves everybody with an empty answer.
        // A mask that ran out of work is cut short without an error: the error comes when a token is taken.
        let mut probe = matcher.clone();
        let first = probe.compute_mask_or_eos().map_err(too_complex)?.iter().next();
        if let Some(token) = first {
            probe.consume_token(token).map_err(too_complex)?;
        }
        Ok(Constraint { matcher, tokens: self.tokens })
    }
}

pub struct Constraint {
    matcher: Matcher,
    tokens: i32,
}

impl Constraint {
    pub fn fill_mask(&mut self, mask: &mut [u32]) -> Result<(), Failure> {
        let allowed = self.matcher.compute_mask_or_eos().map_err(step_failure)?;
        let words = allowed.as_slice();
        if words.iter().skip(mask.len()).any(|word| *word != 0) {
            return Err(internal(format!("the mask has {} words, {} are needed", mask.len(), words.len())));
        }
        for (to, from) in mask.iter_mut().zip(words) {
            *to |= from;
        }
        Ok(())
    }

    pub fn accept(&mut self, token: i32) -> Result<(), Failure> {
        if token < 0 || token >= self.tokens {
            return Err(invalid(format!("token {token} is outside of the vocabulary")));
        }
        let token = token as TokenId;
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            // After the end only the end may be repeated: the engine may hand in the stop token it sampled.
            let ends = self.matcher.tok_env().map_err(internal)?.tok_trie().eos_tokens().contains(&token);
            return if ends { Ok(()) } else { Err(invalid(format!("token {token} after the end of the grammar"))) };
        }
        // validate first: a refused token must leave the state as it was.
        match self.matcher.validate_tokens(&[token]).map_err(step_failure)? {
            1 => self.matcher.consume_token(token).map_err(step_failure),
            _ => Err(invalid(format!("the grammar does not allow token {token} here"))),
        }
    }

    pub fn finished(&self) -> bool {
        self.matcher.is_stopped()
            && !matches!(self.matcher.stop_reason(), StopReason::InternalError | StopReason::Cancelled)
    }
}

fn too_complex(error: impl std::fmt::Display) -> Failure {
    invalid(format!("the grammar is too complex: {error}"))
}

fn step_failure(error: impl std::fmt::Display) -> Failure {
    exhausted(format!("constrained decoding stopped: {error}"))
}

fn marked(name: &[u8]) -> Vec<u8> {
    let mut word = vec![TokTrie::SPECIAL_TOKEN_MARKER];
    word.extend_from_slice(name);
    word
}

/// Counts brackets as the parsers see them: not behind a backslash, not inside a Lark string or a regex's [class].
fn check_nesting(text: &str, lark: bool) -> Result<(), Failure> {
    let (mut depth, mut quoted, mut escaped) = (0usize, None, false);
    for byte in text.bytes() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            _ if quoted.is_some() => quoted = quoted.filter(|end| *end != byte && byte != b'\n'),
            b'"' if lark => quoted = Some(b'"'),
            b'[' if !lark => quoted = Some(b']'),
            b'(' | b'{' | b'[' => depth += 1,
            b')' | b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > NESTING_MAX {
            return Err(invalid(format!("brackets nest deeper than {NESTING_MAX}")));
        }
    }
    Ok(())
}
