//! What every extern function of lib.rs shares: failures, the panic guard, borrowed input, and the sink for output.

use std::cell::RefCell;
use std::ffi::c_void;
use std::panic::AssertUnwindSafe;
use std::sync::Once;

/// qt_code
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Code {
    Ok = 0,
    InvalidArgument = 1,
    ResourceExhausted = 2,
    Internal = 3,
}

#[derive(Debug)]
pub struct Failure {
    pub code: Code,
    pub message: String,
}

pub fn invalid(message: impl ToString) -> Failure {
    Failure { code: Code::InvalidArgument, message: message.to_string() }
}
pub fn exhausted(message: impl ToString) -> Failure {
    Failure { code: Code::ResourceExhausted, message: message.to_string() }
}
pub fn internal(message: impl ToString) -> Failure {
    Failure { code: Code::Internal, message: message.to_string() }
}

/// qt_sink
pub type Sink = extern "C" fn(context: *mut c_void, data: *const c_void, size: usize);

thread_local! {
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// Runs `body`; a panic becomes Code::Internal with its place and message. The default hook, which would print every
/// panic on stderr, is replaced once: the message travels in the status instead.
pub fn guard<T>(body: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        std::panic::set_hook(Box::new(|info| {
            let message = info.to_string();
            PANIC.with(|last| *last.borrow_mut() = message);
        }));
    });
    std::panic::catch_unwind(AssertUnwindSafe(body))
        .unwrap_or_else(|_| Err(internal(PANIC.with(|last| std::mem::take(&mut *last.borrow_mut())))))
}

/// Hands the value, or the failure's message, to the sink.
pub fn finish<T>(
    result: Result<T, Failure>, sink: Sink, context: *mut c_void, view: impl FnOnce(&T) -> (*const c_void, usize),
) -> Code {
    match result {
        Ok(value) => {
            let (data, size) = view(&value);
            if size > 0 {
                sink(context, data, size);
            }
            Code::Ok
        }
        Err(failure) => {
            sink(context, failure.message.as_ptr().cast(), failure.message.len());
            failure.code
        }
    }
}

/// Stores a new object behind `out`, or gives its failure to the sink.
/// # Safety
/// `out` is writable.
pub unsafe fn put<T>(made: Result<T, Failure>, out: *mut *mut T, sink: Sink, context: *mut c_void) -> Code {
    let boxed = made.map(|object| unsafe { out.write(Box::into_raw(Box::new(object))) });
    finish(boxed, sink, context, |_| (std::ptr::null(), 0))
}

/// # Safety
/// `object` is null or came from `put`, and is not used afterwards.
pub unsafe fn free<T>(object: *mut T) {
    if !object.is_null() {
        let _ = guard(|| {
            drop(unsafe { Box::from_raw(object) });
            Ok(())
        });
    }
}

/// # Safety
/// `data` points at `size` readable bytes for the call, or `size` is 0.
pub unsafe fn bytes<'a>(data: *const std::ffi::c_char, size: usize) -> &'a [u8] {
    if size == 0 { &[] } else { unsafe { std::slice::from_raw_parts(data.cast(), size) } }
}

/// # Safety
/// `data` points at `count` readable integers for the call, or `count` is 0.
pub unsafe fn ids<'a>(data: *const i32, count: usize) -> &'a [i32] {
    if count == 0 { &[] } else { unsafe { std::slice::from_raw_parts(data, count) } }
}

pub fn utf8<'a>(text: &'a [u8], what: &str) -> Result<&'a str, Failure> {
    std::str::from_utf8(text).map_err(|error| invalid(format!("{what} is not UTF-8: {error}")))
}
