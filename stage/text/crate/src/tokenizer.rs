//! A tokenizer.json through Hugging Face's own crate, with a table of every token's name and bytes beside it.

use crate::ffi::{Failure, internal, invalid, utf8};
use std::collections::HashMap;
use std::sync::Arc;
use tokenizers::DecoderWrapper;

pub struct Entry {
    pub name: String,
    pub bytes: Vec<u8>,
    pub special: bool,
    pub added: bool,
}

pub struct Tokenizer {
    pub inner: Arc<tokenizers::Tokenizer>,
    entries: Vec<Option<Entry>>,
}

impl Tokenizer {
    pub fn new(json: &[u8]) -> Result<Self, Failure> {
        let mut inner =
            tokenizers::Tokenizer::from_bytes(json).map_err(|error| invalid(format!("tokenizer.json: {error}")))?;
        if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(invalid("tokenizer.json: the decoder is not ByteLevel"));
        }
        inner.with_truncation(None).map_err(internal)?;
        inner.with_padding(None);

        let vocabulary = inner.get_vocab(true);
        let added = inner.get_added_tokens_decoder();
        let size = vocabulary.values().map(|id| *id as usize + 1).max().unwrap_or(0);
        // Ids are a table index here and a logit column elsewhere: one absurd id must not take all memory.
        if size > 1 << 24 {
            return Err(invalid("tokenizer.json: a token id is 2^24 or more"));
        }
        let byte_of = byte_level_alphabet();
        let mut entries: Vec<Option<Entry>> = (0..size).map(|_| None).collect();
        for id in vocabulary.into_values() {
            // The name comes from id_to_token, which prefers the added token's, as decode does.
            let Some(name) = inner.id_to_token(id) else { continue };
            // ByteLevel decodes a token by its alphabet, or takes it as text when one character is not in there.
            let bytes = name.chars().map(|c| byte_of.get(&c).copied()).collect::<Option<Vec<u8>>>();
            let bytes = bytes.unwrap_or_else(|| name.as_bytes().to_vec());
            let token = added.get(&id);
            entries[id as usize] =
                Some(Entry { name, bytes, special: token.is_some_and(|t| t.special), added: token.is_some() });
        }
        Ok(Self { inner: Arc::new(inner), entries })
    }

    pub fn encode(&self, text: &[u8], add_special_tokens: bool) -> Result<Vec<i32>, Failure> {
        let text = utf8(text, "the text")?;
        let encoding = self.inner.encode_fast(text, add_special_tokens).map_err(invalid)?;
        Ok(encoding.get_ids().iter().map(|id| *id as i32).collect())
    }

    pub fn decode(&self, ids: &[i32], skip_special_tokens: bool) -> Result<String, Failure> {
        let known: Vec<u32> = ids.iter().filter(|id| self.entry(**id).is_some()).map(|id| *id as u32).collect();
        self.inner.decode(&known, skip_special_tokens).map_err(invalid)
    }

    pub fn size(&self) -> i32 {
        self.entries.len() as i32
    }

    pub fn token_to_id(&self, token: &[u8]) -> i32 {
        let id = std::str::from_utf8(token).ok().and_then(|token| self.inner.token_to_id(token));
        id.map_or(-1, |id| id as i32)
    }

    pub fn entry(&self, id: i32) -> Option<&Entry> {
        usize::try_from(id).ok().and_then(|id| self.entries.get(id)).and_then(|entry| entry.as_ref())
    }
}

/// GPT-2's byte alphabet: printable Latin-1 bytes stand for themselves, the other 68 for U+0100 and up, in order.
fn byte_level_alphabet() -> HashMap<char, u8> {
    let mut next = 0x100;
    (0..=255u8)
        .map(|byte| match byte {
            b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => (byte as char, byte),
            _ => {
                next += 1;
                (char::from_u32(next - 1).unwrap(), byte)
            }
        })
        .collect()
}
