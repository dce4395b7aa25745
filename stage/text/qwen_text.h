/* stage/text/qwen_text.h — the C ABI between stage/text and its Rust crate (stage/text/crate). The C++ wrappers
 * (tokenizer.h, chat_template.h, constraint.h) are its only users; crate/src/ holds the other side of every line here.
 *
 * Conventions
 *  - Text in: UTF-8 bytes with a size, not zero-terminated, borrowed for the call.
 *  - Data out: through a qt_sink. A call that returns QT_OK may have called the sink with its result (once); a call
 * that returns anything else has called it once with the message, UTF-8, for people. So no memory changes owner.
 *  - Objects: made by *_new, ended by *_free (null is allowed). A qt_constraint keeps alive what it needs of its
 *    qt_compiler, and a qt_compiler of its qt_tokenizer: any order of *_free is right.
 *  - Panics never cross: every function catches them, and gives QT_INTERNAL with the panic's message.
 *  - Thread safety: a qt_tokenizer, qt_template or qt_compiler is immutable after *_new and may be used from any number
 *    of threads at once. A qt_constraint is used by one thread at a time.
 */
#ifndef QWEN_STAGE_TEXT_QWEN_TEXT_H_
#define QWEN_STAGE_TEXT_QWEN_TEXT_H_
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct qt_tokenizer qt_tokenizer;
typedef struct qt_template qt_template;
typedef struct qt_compiler qt_compiler;
typedef struct qt_constraint qt_constraint;

typedef enum qt_code {
  QT_OK = 0,
  QT_INVALID_ARGUMENT = 1,   /* the caller's text, schema, messages or token is wrong */
  QT_RESOURCE_EXHAUSTED = 2, /* a bound was reached: output size, fuel, input size */
  QT_INTERNAL = 3            /* a bug here or in a crate (a caught panic) */
} qt_code;

/* Receives `size` bytes, borrowed for the call. Must not throw. */
typedef void (*qt_sink)(void* context, const void* data, size_t size);

/* ---- tokenizer: Hugging Face's own crate over a tokenizer.json ---- */

/* `json` is the text of a tokenizer.json whose decoder is ByteLevel; truncation and padding named in it are dropped,
 * since a prompt is never cut silently. */
qt_code qt_tokenizer_new(const char* json, size_t size, qt_tokenizer** out, qt_sink sink, void* context);
void qt_tokenizer_free(qt_tokenizer* tokenizer);
/* The sink gets the ids as native int32. Added tokens that appear in the text become their id, as in transformers. */
qt_code qt_tokenizer_encode(const qt_tokenizer* tokenizer, const char* text, size_t size, int add_special_tokens,
                            qt_sink sink, void* context);
/* The sink gets UTF-8; bytes that are none are U+FFFD. Ids without a token add nothing. */
qt_code qt_tokenizer_decode(const qt_tokenizer* tokenizer, const int32_t* ids, size_t count, int skip_special_tokens,
                            qt_sink sink, void* context);
/* Highest id + 1, added tokens included. */
int32_t qt_tokenizer_size(const qt_tokenizer* tokenizer);
/* The id of exactly this vocabulary string or added token, or -1. */
int32_t qt_tokenizer_token_to_id(const qt_tokenizer* tokenizer, const char* token, size_t size);

typedef struct qt_token {
  const char* name; /* the vocabulary string ("Ġworld"), UTF-8 */
  size_t name_size;
  const uint8_t* bytes; /* what it decodes to (" world"); may be a part of a UTF-8 character */
  size_t bytes_size;
  int32_t special; /* 1: dropped by skip_special_tokens */
} qt_token;
/* 1 and *out, whose pointers live as long as the tokenizer; 0 when `id` has no token. */
int qt_tokenizer_token(const qt_tokenizer* tokenizer, int32_t id, qt_token* out);

/* ---- chat template: Jinja as transformers configures it (minijinja) ---- */

/* The checkpoint's files as text; null with size 0 for one that is not there. The template is the first of: `jinja`
 * (chat_template.jinja), the chat_template of `legacy_json` (chat_template.json), the chat_template of `config_json`
 * (tokenizer_config.json; a string, or a list of {name, template} from which "tool_use" is taken when there are tools,
 * else "default"). The special tokens of `config_json` (eos_token, ...) are names that every rendering sees. */
typedef struct qt_template_files {
  const char* jinja;
  size_t jinja_size;
  const char* legacy_json;
  size_t legacy_json_size;
  const char* config_json;
  size_t config_json_size;
} qt_template_files;
qt_code qt_template_new(const qt_template_files* files, qt_template** out, qt_sink sink, void* context);
void qt_template_free(qt_template* chat_template);
/* `context_json` is an object; messages, tools, documents and add_generation_prompt get transformers' defaults. Output
 * is at most `size_max` bytes (QT_RESOURCE_EXHAUSTED beyond). QT_INVALID_ARGUMENT carries the message of
 * raise_exception() alone, or the engine's own message. */
qt_code qt_template_render(const qt_template* chat_template, const char* context_json, size_t size, size_t size_max,
                           qt_sink sink, void* context);

/* ---- constrained decoding: llguidance ---- */

typedef enum qt_grammar { QT_JSON_SCHEMA = 0, QT_REGEX = 1, QT_LARK = 2 } qt_grammar;

/* `vocab_size` is the number of logit columns (>= the tokenizer's size; the rest is never allowed). `eos` ends a
 * finished grammar: 1 or more ids. */
qt_code qt_compiler_new(const qt_tokenizer* tokenizer, int32_t vocab_size, const int32_t* eos, size_t eos_count,
                        qt_compiler** out, qt_sink sink, void* context);
void qt_compiler_free(qt_compiler* compiler);
qt_code qt_constraint_new(const qt_compiler* compiler, qt_grammar grammar, const char* text, size_t size,
                          qt_constraint** out, qt_sink sink, void* context);
void qt_constraint_free(qt_constraint* constraint);
/* Sets bit i%32 of word i/32 for every token that may come next, in `words` zeroed words, words >= ceil(vocab/32). */
qt_code qt_constraint_mask(qt_constraint* constraint, uint32_t* mask, size_t words, qt_sink sink, void* context);
/* Moves on by one sampled token. QT_INVALID_ARGUMENT when the grammar does not allow it; the state is then unchanged.
 */
qt_code qt_constraint_accept(qt_constraint* constraint, int32_t token, qt_sink sink, void* context);
/* 1: the grammar is complete and only an end-of-sequence token may follow (or one has been accepted). */
int qt_constraint_finished(const qt_constraint* constraint);

#ifdef __cplusplus
}
#endif
#endif /* QWEN_STAGE_TEXT_QWEN_TEXT_H_ */
