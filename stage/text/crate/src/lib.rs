//! The Rust side of stage/text: tokenizer, chat template and token masks behind the C ABI of stage/text/qwen_text.h.
//! Every extern function here has its contract in that header; the modules hold safe Rust.

mod constraint;
mod ffi;
mod pycompat;
mod pyvalue;
mod template;
mod tokenizer;

use ffi::{Code, Failure, Sink, bytes, finish, guard, ids, put};
use std::ffi::{c_char, c_int, c_void};

/// # Safety
/// For all functions below: pointers and sizes are as qwen_text.h says. C++ wrappers are the only callers.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_tokenizer_new(
    json: *const c_char, size: usize, out: *mut *mut tokenizer::Tokenizer, sink: Sink, context: *mut c_void,
) -> Code {
    let made = guard(|| tokenizer::Tokenizer::new(unsafe { bytes(json, size) }));
    unsafe { put(made, out, sink, context) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_tokenizer_free(tokenizer: *mut tokenizer::Tokenizer) {
    unsafe { ffi::free(tokenizer) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_tokenizer_encode(
    tokenizer: *const tokenizer::Tokenizer, text: *const c_char, size: usize, add_special_tokens: c_int, sink: Sink,
    context: *mut c_void,
) -> Code {
    let encoded = guard(|| unsafe { (*tokenizer).encode(bytes(text, size), add_special_tokens != 0) });
    finish(encoded, sink, context, |ids: &Vec<i32>| (ids.as_ptr().cast(), std::mem::size_of_val(ids.as_slice())))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_tokenizer_decode(
    tokenizer: *const tokenizer::Tokenizer, tokens: *const i32, count: usize, skip_special_tokens: c_int, sink: Sink,
    context: *mut c_void,
) -> Code {
    let text = guard(|| unsafe { (*tokenizer).decode(ids(tokens, count), skip_special_tokens != 0) });
    finish(text, sink, context, |text: &String| (text.as_ptr().cast(), text.len()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_tokenizer_size(tokenizer: *const tokenizer::Tokenizer) -> i32 {
    unsafe { (*tokenizer).size() }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_tokenizer_token_to_id(
    tokenizer: *const tokenizer::Tokenizer, token: *const c_char, size: usize,
) -> i32 {
    guard(|| Ok(unsafe { (*tokenizer).token_to_id(bytes(token, size)) })).unwrap_or(-1)
}

#[repr(C)]
pub struct Token {
    name: *const c_char,
    name_size: usize,
    bytes: *const u8,
    bytes_size: usize,
    special: i32,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_tokenizer_token(tokenizer: *const tokenizer::Tokenizer, id: i32, out: *mut Token) -> c_int {
    let Some(entry) = (unsafe { (*tokenizer).entry(id) }) else { return 0 };
    let token = Token {
        name: entry.name.as_ptr().cast(),
        name_size: entry.name.len(),
        bytes: entry.bytes.as_ptr(),
        bytes_size: entry.bytes.len(),
        special: entry.special as i32,
    };
    unsafe { out.write(token) };
    1
}

#[repr(C)]
pub struct TemplateFiles {
    jinja: *const c_char,
    jinja_size: usize,
    legacy_json: *const c_char,
    legacy_json_size: usize,
    config_json: *const c_char,
    config_json_size: usize,
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_template_new(
    files: *const TemplateFiles, out: *mut *mut template::ChatTemplate, sink: Sink, context: *mut c_void,
) -> Code {
    let made = guard(|| unsafe {
        let files = &*files;
        let text = |data: *const c_char, size| if data.is_null() { None } else { Some(bytes(data, size)) };
        template::ChatTemplate::new(
            text(files.jinja, files.jinja_size),
            text(files.legacy_json, files.legacy_json_size),
            text(files.config_json, files.config_json_size),
        )
    });
    unsafe { put(made, out, sink, context) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_template_free(chat_template: *mut template::ChatTemplate) {
    unsafe { ffi::free(chat_template) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_template_render(
    chat_template: *const template::ChatTemplate, context_json: *const c_char, size: usize, size_max: usize,
    sink: Sink, context: *mut c_void,
) -> Code {
    let text = guard(|| unsafe { (*chat_template).render(bytes(context_json, size), size_max) });
    finish(text, sink, context, |text: &Vec<u8>| (text.as_ptr().cast(), text.len()))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_compiler_new(
    tokenizer: *const tokenizer::Tokenizer, vocab_size: i32, eos: *const i32, eos_count: usize,
    out: *mut *mut constraint::Compiler, sink: Sink, context: *mut c_void,
) -> Code {
    let made = guard(|| constraint::Compiler::new(unsafe { &*tokenizer }, vocab_size, unsafe { ids(eos, eos_count) }));
    unsafe { put(made, out, sink, context) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_compiler_free(compiler: *mut constraint::Compiler) {
    unsafe { ffi::free(compiler) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_constraint_new(
    compiler: *const constraint::Compiler, grammar: c_int, text: *const c_char, size: usize,
    out: *mut *mut constraint::Constraint, sink: Sink, context: *mut c_void,
) -> Code {
    let made = guard(|| unsafe { (*compiler).compile(grammar, bytes(text, size)) });
    unsafe { put(made, out, sink, context) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_constraint_free(constraint: *mut constraint::Constraint) {
    unsafe { ffi::free(constraint) }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_constraint_mask(
    constraint: *mut constraint::Constraint, mask: *mut u32, words: usize, sink: Sink, context: *mut c_void,
) -> Code {
    let filled = guard(|| unsafe { (*constraint).fill_mask(std::slice::from_raw_parts_mut(mask, words)) });
    finish(filled, sink, context, |_| (std::ptr::null(), 0))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_constraint_accept(
    constraint: *mut constraint::Constraint, token: i32, sink: Sink, context: *mut c_void,
) -> Code {
    let accepted = guard(|| unsafe { (*constraint).accept(token) });
    finish(accepted, sink, context, |_| (std::ptr::null(), 0))
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn qt_constraint_finished(constraint: *const constraint::Constraint) -> c_int {
    guard(|| Ok::<_, Failure>(unsafe { (*constraint).finished() })).unwrap_or(true) as c_int
}
