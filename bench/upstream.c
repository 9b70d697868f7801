/*
 * The mock upstream: both dialects, rendered before anybody asks, on one thread.
 *
 *     upstream PORT
 *
 * prints "ready" when it listens on 127.0.0.1.  How it answers is set for everybody at once:
 *
 *     GET /control?stream=1&events=1000&interval_us=20000&text_bytes=20&delay_us=0&fail_status=0
 *
 * `stream`: answer with an event stream (otherwise with one JSON document).  `interval_us`: one event each
 * interval; 0: as fast as the reader reads, one write for each event.  `text_bytes`: the text of an event or
 * of the document, 20 at least.  `delay_us`: before the head.  `fail_status`: answer a request with this
 * status when its body's number ("req-" and ten digits) comes for the first time, and as usual when it comes
 * again, so that half of all calls fail and every request succeeds at its second try.
 * GET /counters says what was done so far.
 *
 * Each event's text begins with '@' and the nanosecond at which it was due; that is when it is written,
 * unless the reader or this program is late, which is then seen by whoever subtracts.
 */
#include "sayings.h"
#include "wire.h"

#define HEAD_ROOM 16384
#define SEEN 65536

static struct behavior {
    long stream, events, interval_us, text_bytes, delay_us, fail_status;
} behavior = {.events = 10, .text_bytes = 20};

static struct counters {
    uint64_t connections, requests, failures, events, event_bytes;
} counters;

struct connection {
    struct timed timed; /* first: what is due is a connection */
    int fd;
    bool in_body, writable_wanted, answering, streaming, ended;
    enum dialect dialect;
    char head[HEAD_ROOM];
    size_t head_length;
    struct body body;
    char number[10]; /* of the request, as its body says */
    bool numbered;
    long events_left, interval_us;
    uint64_t event_due_ns;
    char *unsent;
    size_t unsent_length, unsent_at;
    struct connection *next_ready, *next_gone;
    bool ready;
};

static int poll_fd;
static struct heap due;
static struct connection *ready_first, *ready_last, *gone;
static unsigned char seen[SEEN];

/* --- saying it ---------------------------------------------------------------------------------------- */

static void end_connection(struct connection *connection) {
    if (connection->ended) return;
    connection->ended = true;
    heap_remove(&due, &connection->timed);
    close(connection->fd);
    free(connection->unsent);
    connection->next_gone = gone;
    gone = connection;
}

static void watch(struct connection *connection, bool writable) {
    if (connection->writable_wanted == writable) return;
    connection->writable_wanted = writable;
    struct epoll_event event = {.events = EPOLLIN | (writable ? EPOLLOUT : 0), .data.ptr = connection};
    if (epoll_ctl(poll_fd, EPOLL_CTL_MOD, connection->fd, &event)) fail("epoll_ctl");
}

/* Send what is said; what the socket does not take is kept until it does. */
static void say(struct connection *connection, const char *data, size_t length) {
    ssize_t sent = send(connection->fd, data, length, MSG_NOSIGNAL);
    if (sent == (ssize_t)length) return;
    if (sent < 0) {
        if (errno != EAGAIN) {
            end_connection(connection);
            return;
        }
        sent = 0;
    }
    connection->unsent_at = 0;
    connection->unsent_length = length - (size_t)sent;
    connection->unsent = checked(realloc(connection->unsent, connection->unsent_length));
    memcpy(connection->unsent, data + sent, connection->unsent_length);
    watch(connection, true);
}

static void become_ready(struct connection *connection) {
    if (connection->ready) return;
    connection->ready = true;
    connection->next_ready = NULL;
    if (ready_last) ready_last->next_ready = connection;
    else ready_first = connection;
    ready_last = connection;
}

/* Go on with a stream: when its next event is due, or with the next turn. */
static void schedule(struct connection *connection) {
    if (connection->ended || connection->unsent_length) return;
    if (connection->interval_us) heap_add(&due, &connection->timed, connection->event_due_ns);
    else become_ready(connection);
}

static void stamp(enum dialect dialect, uint64_t time) {
    char *digits = says[dialect].event.data + says[dialect].stamp;
    for (int at = STAMP_DIGITS - 1; at >= 0; at--, time /= 10) digits[at] = (char)('0' + time % 10);
}

static void say_event(struct connection *connection) {
    enum dialect dialect = connection->dialect;
    if (!connection->events_left) {
        connection->streaming = connection->answering = false;
        say(connection, says[dialect].closing.data, says[dialect].closing.length);
        return;
    }
    connection->events_left--;
    stamp(dialect, connection->interval_us ? connection->event_due_ns : now_ns());
    connection->event_due_ns += (uint64_t)connection->interval_us * 1000;
    counters.events++;
    counters.event_bytes += says[dialect].event.length;
    say(connection, says[dialect].event.data, says[dialect].event.length);
    schedule(connection);
}

/* Whether the request is one that fails: its number comes for the first time. */
static bool fails(const struct connection *connection) {
    if (!behavior.fail_status) return false;
    if (!connection->numbered) return counters.requests % 2;
    unsigned long number = 0;
    for (int at = 0; at < 10; at++) number = number * 10 + (unsigned long)(connection->number[at] - '0');
    unsigned char bit = (unsigned char)(1u << (number % 8)), *where = &seen[number / 8 % SEEN];
    *where ^= bit;
    return *where & bit;
}

static void answer(struct connection *connection) {
    enum dialect dialect = connection->dialect;
    if (fails(connection)) {
        counters.failures++;
        connection->answering = false;
        say(connection, says[dialect].failure.data, says[dialect].failure.length);
    } else if (!behavior.stream) {
        connection->answering = false;
        say(connection, says[dialect].plain.data, says[dialect].plain.length);
    } else {
        connection->streaming = true;
        connection->events_left = behavior.events;
        connection->interval_us = behavior.interval_us;
        connection->event_due_ns = now_ns();
        say(connection, says[dialect].opening.data, says[dialect].opening.length);
        schedule(connection);
    }
}

/* --- what is asked ------------------------------------------------------------------------------------ */

static void set(const char *query, const char *name, long *value) {
    const char *found = strstr(query, name);
    if (found && found[strlen(name)] == '=') *value = strtol(found + strlen(name) + 1, NULL, 10);
}

static void set_behavior(const char *query) {
    set(query, "stream", &behavior.stream);
    set(query, "events", &behavior.events);
    set(query, "interval_us", &behavior.interval_us);
    set(query, "text_bytes", &behavior.text_bytes);
    set(query, "delay_us", &behavior.delay_us);
    set(query, "fail_status", &behavior.fail_status);
    memset(seen, 0, sizeof seen);
    render_all(behavior.text_bytes, (int)behavior.fail_status);
}

static void say_document(struct connection *connection, int status, const char *body) {
    struct bytes document = rendered_document(status, body);
    connection->answering = false;
    say(connection, document.data, document.length);
    forget(&document);
}

static void say_counters(struct connection *connection) {
    struct bytes json = render("{\"connections\":%lu,\"requests\":%lu,\"failures\":%lu,\"events\":%lu,"
                               "\"event_bytes\":%lu}",
                               counters.connections, counters.requests, counters.failures, counters.events,
                               counters.event_bytes);
    say_document(connection, 200, json.data);
    forget(&json);
}

/* A request is all there. */
static void asked(struct connection *connection) {
    char *path = strchr(connection->head, ' '), *end = path ? strchr(path + 1, ' ') : NULL;
    if (!end) {
        end_connection(connection);
        return;
    }
    *end = 0;
    connection->answering = true;
    if (strstr(path, "/messages")) connection->dialect = MESSAGES;
    else if (strstr(path, "/chat/completions")) connection->dialect = CHAT;
    else {
        if (strstr(path, "/control?")) set_behavior(strchr(path, '?'));
        if (strstr(path, "/counters")) say_counters(connection);
        else say_document(connection, strstr(path, "/control?") ? 200 : 404, "{}");
        return;
    }
    counters.requests++;
    if (behavior.delay_us) heap_add(&due, &connection->timed, now_ns() + (uint64_t)behavior.delay_us * 1000);
    else answer(connection);
}

static void body_piece(void *owner, const char *piece, size_t length) {
    struct connection *connection = owner;
    if (!behavior.fail_status || connection->numbered) return;
    const char *found = memmem(piece, length, "req-", 4);
    if (!found || length - (size_t)(found - piece) < 14) return;
    memcpy(connection->number, found + 4, 10);
    connection->numbered = true;
}

/* Read the head as far as it is there; return how many bytes of `data` were its own. */
static size_t read_head(struct connection *connection, const char *data, size_t length) {
    size_t before = connection->head_length, room = HEAD_ROOM - 1 - before;
    size_t taken = length < room ? length : room;
    memcpy(connection->head + before, data, taken);
    connection->head_length += taken;
    size_t from = before > 3 ? before - 3 : 0;
    char *end = memmem(connection->head + from, connection->head_length - from, "\r\n\r\n", 4);
    if (!end) {
        if (taken < length) end_connection(connection);
        return length;
    }
    size_t head_length = (size_t)(end - connection->head) + 4;
    connection->head[head_length] = 0;
    connection->head_length = 0;
    connection->in_body = true;
    connection->numbered = false;
    connection->body = begin_body(connection->head, head_length, false);
    return head_length - before;
}

static void receive(struct connection *connection) {
    static char data[1 << 18];
    ssize_t length = recv(connection->fd, data, sizeof data, 0);
    if (length < 0 && errno == EAGAIN) return;
    if (length <= 0) {
        end_connection(connection);
        return;
    }
    for (size_t at = 0; at < (size_t)length && !connection->ended;) {
        if (!connection->in_body) at += read_head(connection, data + at, (size_t)length - at);
        if (connection->ended || !connection->in_body) continue;
        ssize_t taken = read_body(&connection->body, data + at, (size_t)length - at, body_piece, connection);
        if (taken < 0) end_connection(connection);
        else at += (size_t)taken;
        if (connection->ended || !connection->body.complete) continue;
        connection->in_body = false;
        asked(connection);
    }
}

static void send_rest(struct connection *connection) {
    size_t length = connection->unsent_length - connection->unsent_at;
    ssize_t sent = send(connection->fd, connection->unsent + connection->unsent_at, length, MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN) end_connection(connection);
        return;
    }
    connection->unsent_at += (size_t)sent;
    if (connection->unsent_at < connection->unsent_length) return;
    connection->unsent_length = 0;
    watch(connection, false);
    if (connection->streaming) schedule(connection);
}

static void accept_all(int listener) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        without_delay(fd);
        struct connection *connection = checked(calloc(1, sizeof *connection));
        connection->fd = fd;
        struct epoll_event event = {.events = EPOLLIN, .data.ptr = connection};
        if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
        counters.connections++;
    }
}

/* One event for each stream that may say one now, then look at the sockets again. */
static void serve_ready(void) {
    struct connection *first = ready_first;
    ready_first = ready_last = NULL;
    for (struct connection *next; first; first = next) {
        next = first->next_ready;
        first->ready = false;
        if (!first->ended) say_event(first);
    }
}

static void serve_due(void) {
    for (struct timed *timed; (timed = heap_take(&due, now_ns()));) {
        struct connection *connection = (struct connection *)timed;
        if (connection->streaming) say_event(connection);
        else answer(connection);
    }
}

static void free_gone(void) {
    for (struct connection *next; gone; gone = next) {
        next = gone->next_gone;
        free(gone);
    }
}

static int listen_on(int port) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0), one = 1;
    struct sockaddr_in address = loopback(port);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&address, sizeof address) || listen(fd, 4096)) fail("listen");
    return fd;
}

int main(int count, char **arguments) {
    if (count != 2) {
        fprintf(stderr, "upstream PORT\n");
        return 2;
    }
    raise_open_files();
    render_all(behavior.text_bytes, (int)behavior.fail_status);
    int listener = listen_on(atoi(arguments[1])), timer;
    static int listener_mark;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = &listener_mark}, events[512];
    if ((poll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0) fail("epoll");
    timer = make_timer(poll_fd);
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, listener, &event)) fail("epoll_ctl");
    announce("ready");
    for (;;) {
        arm(timer, &due);
        int happened = epoll_wait(poll_fd, events, 512, ready_first ? 0 : -1);
        for (int at = 0; at < happened; at++) {
            struct connection *connection = events[at].data.ptr;
            if (!connection) continue; /* the timer */
            if ((void *)connection == &listener_mark) {
                accept_all(listener);
                continue;
            }
            if (!connection->ended && events[at].events & ~(uint32_t)EPOLLOUT) receive(connection);
            if (!connection->ended && events[at].events & EPOLLOUT && connection->unsent_length)
                send_rest(connection);
        }
        serve_due();
        serve_ready();
        free_gone();
    }
}
