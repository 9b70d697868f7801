/*
 * What the upstream says, rendered before anybody asks: a document and a stream for each dialect.
 */
#ifndef BENCH_SAYINGS_H
#define BENCH_SAYINGS_H

#include "wire.h"

#include <stdarg.h>

enum dialect { MESSAGES, CHAT };

struct bytes {
    char *data;
    size_t length;
};

/* All that is ever said, once for each dialect. */
static struct {
    struct bytes plain, failure, opening, event, closing;
    size_t stamp; /* where the stamp's digits are in `event` */
} says[2];

static struct bytes render(const char *format, ...) __attribute__((format(printf, 1, 2)));
static struct bytes render(const char *format, ...) {
    struct bytes bytes;
    va_list arguments;
    va_start(arguments, format);
    int length = vasprintf(&bytes.data, format, arguments);
    va_end(arguments);
    if (length < 0) fail("memory");
    bytes.length = (size_t)length;
    return bytes;
}

static struct bytes rendered_document(int status, const char *body) {
    return render("HTTP/1.1 %d Mock\r\nContent-Type: application/json\r\nrequest-id: req_mock\r\n"
                  "Content-Length: %zu\r\n\r\n%s",
                  status, strlen(body), body);
}

/* Append one event, as a chunk of its own. */
static void append_event(struct bytes *to, const char *name, const char *data) {
    struct bytes text = name ? render("event: %s\ndata: %s\n\n", name, data) : render("data: %s\n\n", data);
    struct bytes all =
        render("%.*s%zx\r\n%s\r\n", (int)to->length, to->data ? to->data : "", text.length, text.data);
    free(text.data);
    free(to->data);
    *to = all;
}

static const char STREAM_HEAD[] = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                                  "Cache-Control: no-cache\r\nrequest-id: req_mock\r\n"
                                  "Transfer-Encoding: chunked\r\n\r\n";

static void forget(struct bytes *bytes) {
    free(bytes->data);
    *bytes = (struct bytes){0};
}

static void render_messages(const char *text) {
    struct bytes *plain = &says[MESSAGES].plain, *opening = &says[MESSAGES].opening,
                 *event = &says[MESSAGES].event, *closing = &says[MESSAGES].closing;
    struct bytes json =
        render("{\"id\":\"msg_mock\",\"type\":\"message\",\"role\":\"assistant\",\"model\":\"mock\","
               "\"content\":[{\"type\":\"text\",\"text\":\"%s\"}],\"stop_reason\":\"end_turn\","
               "\"stop_sequence\":null,\"usage\":{\"input_tokens\":10,\"output_tokens\":5}}",
               text);
    *plain = rendered_document(200, json.data);
    forget(&json);
    *opening = render("%s", STREAM_HEAD);
    append_event(opening, "message_start",
                 "{\"type\":\"message_start\",\"message\":{\"id\":\"msg_mock\",\"type\":\"message\","
                 "\"role\":\"assistant\",\"model\":\"mock\",\"content\":[],\"stop_reason\":null,"
                 "\"stop_sequence\":null,\"usage\":{\"input_tokens\":10,\"output_tokens\":1}}}");
    append_event(
        opening, "content_block_start",
        "{\"type\":\"content_block_start\",\"index\":0,\"content_block\":{\"type\":\"text\",\"text\":\"\"}}");
    json = render(
        "{\"type\":\"content_block_delta\",\"index\":0,\"delta\":{\"type\":\"text_delta\",\"text\":\"%s\"}}",
        text);
    append_event(event, "content_block_delta", json.data);
    forget(&json);
    append_event(closing, "content_block_stop", "{\"type\":\"content_block_stop\",\"index\":0}");
    append_event(
        closing, "message_delta",
        "{\"type\":\"message_delta\",\"delta\":{\"stop_reason\":\"end_turn\",\"stop_sequence\":null},"
        "\"usage\":{\"output_tokens\":5}}");
    append_event(closing, "message_stop", "{\"type\":\"message_stop\"}");
}

#define CHUNK                                                                                                \
    "{\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion.chunk\",\"created\":1700000000,\"model\":"       \
    "\"mock\","
#define COUNTS "\"usage\":{\"prompt_tokens\":10,\"completion_tokens\":5,\"total_tokens\":15}}"

static void render_chat(const char *text) {
    struct bytes *plain = &says[CHAT].plain, *opening = &says[CHAT].opening, *event = &says[CHAT].event,
                 *closing = &says[CHAT].closing;
    struct bytes json =
        render("{\"id\":\"chatcmpl-mock\",\"object\":\"chat.completion\",\"created\":1700000000,"
               "\"model\":\"mock\",\"choices\":[{\"index\":0,\"message\":{\"role\":\"assistant\","
               "\"content\":\"%s\"},\"finish_reason\":\"stop\"}]," COUNTS,
               text);
    *plain = rendered_document(200, json.data);
    forget(&json);
    *opening = render("%s", STREAM_HEAD);
    append_event(opening, NULL,
                 CHUNK "\"choices\":[{\"index\":0,\"delta\":{\"role\":\"assistant\",\"content\":\"\"},"
                       "\"finish_reason\":null}]}");
    json = render(CHUNK "\"choices\":[{\"index\":0,\"delta\":{\"content\":\"%s\"},\"finish_reason\":null}]}",
                  text);
    append_event(event, NULL, json.data);
    forget(&json);
    append_event(closing, NULL, CHUNK "\"choices\":[{\"index\":0,\"delta\":{},\"finish_reason\":\"stop\"}]}");
    append_event(closing, NULL, CHUNK "\"choices\":[]," COUNTS);
    append_event(closing, NULL, "[DONE]");
}

/* Render all of it anew, with texts of that length and failures of that status. */
static void render_all(long text_bytes, int fail_status) {
    size_t length = text_bytes > STAMP_DIGITS ? (size_t)text_bytes : STAMP_DIGITS + 1;
    char *text = checked(malloc(length + 1));
    memset(text, 'x', length);
    memset(text, '0', STAMP_DIGITS + 1);
    text[0] = '@';
    text[length] = 0;
    int status = fail_status ? fail_status : 500;
    for (int dialect = 0; dialect < 2; dialect++) {
        forget(&says[dialect].plain);
        forget(&says[dialect].failure);
        forget(&says[dialect].opening);
        forget(&says[dialect].event);
        forget(&says[dialect].closing);
        says[dialect].failure = rendered_document(
            status,
            "{\"type\":\"error\",\"error\":{\"type\":\"overloaded_error\",\"message\":\"mock failure\"}}");
    }
    render_messages(text);
    render_chat(text);
    free(text);
    for (int dialect = 0; dialect < 2; dialect++) {
        struct bytes *closing = &says[dialect].closing;
        struct bytes ended = render("%s0\r\n\r\n", closing->data);
        forget(closing);
        *closing = ended;
        says[dialect].stamp = (size_t)(strchr(says[dialect].event.data, '@') - says[dialect].event.data) + 1;
    }
}

#endif
