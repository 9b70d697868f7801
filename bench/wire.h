/*
 * What the upstream and the load generator share: the clock, a heap of what is due, the reading of
 * HTTP/1.1 heads and chunked bodies, sockets.  Loopback peers that we chose ourselves are spoken with, so
 * whatever is odd ends the program with a message instead of being put up with.
 */
#ifndef BENCH_WIRE_H
#define BENCH_WIRE_H

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/timerfd.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define NEVER UINT64_MAX
#define STAMP_DIGITS 19 /* nanoseconds since the machine started, after an '@' */

static inline void fail(const char *what) {
    fprintf(stderr, "%s: %s\n", what, strerror(errno));
    exit(1);
}

static inline void *checked(void *allocated) {
    if (!allocated) fail("memory");
    return allocated;
}

/* Nanoseconds on the clock that all processes of a machine share. */
static inline uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* What this program has used of its core. */
static inline uint64_t cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Tell whoever started this, at once. */
static inline void announce(const char *word) {
    puts(word);
    fflush(stdout);
}

/* Things that are due at a time: a binary heap, in which each thing knows its place. */
struct timed {
    uint64_t due_ns;
    size_t place; /* from 1; 0: not in the heap */
};

struct heap {
    struct timed **items; /* items[1] is due first */
    size_t count, room;
};

static inline void heap_put(struct heap *heap, size_t place, struct timed *item) {
    heap->items[place] = item;
    item->place = place;
}

static inline void heap_settle(struct heap *heap, size_t place, struct timed *item) {
    while (place > 1 && heap->items[place / 2]->due_ns > item->due_ns) {
        heap_put(heap, place, heap->items[place / 2]);
        place /= 2;
    }
    for (size_t below; (below = 2 * place) <= heap->count; place = below) {
        if (below < heap->count && heap->items[below + 1]->due_ns < heap->items[below]->due_ns) below++;
        if (heap->items[below]->due_ns >= item->due_ns) break;
        heap_put(heap, place, heap->items[below]);
    }
    heap_put(heap, place, item);
}

static inline void heap_remove(struct heap *heap, struct timed *item) {
    size_t place = item->place;
    if (!place) return;
    item->place = 0;
    struct timed *last = heap->items[heap->count--];
    if (last != item) heap_settle(heap, place, last);
}

static inline void heap_add(struct heap *heap, struct timed *item, uint64_t due_ns) {
    heap_remove(heap, item);
    item->due_ns = due_ns;
    if (++heap->count >= heap->room) {
        heap->room = heap->room ? heap->room * 2 : 1024;
        heap->items = checked(realloc(heap->items, heap->room * sizeof *heap->items));
    }
    heap_settle(heap, heap->count, item);
}

/* Return the first thing that is due by now, out of the heap, or NULL. */
static inline struct timed *heap_take(struct heap *heap, uint64_t now) {
    if (!heap->count || heap->items[1]->due_ns > now) return NULL;
    struct timed *first = heap->items[1];
    heap_remove(heap, first);
    return first;
}

/* Wake epoll through `timer` when the first thing is due: epoll's own milliseconds are too coarse. */
static inline void arm(int timer, const struct heap *heap) {
    static uint64_t armed = NEVER;
    uint64_t due = heap->count ? heap->items[1]->due_ns : NEVER;
    if (due == armed) return;
    armed = due;
    struct itimerspec at = {{0, 0}, {0, 0}};
    if (due != NEVER) at.it_value = (struct timespec){(time_t)(due / 1000000000u), (long)(due % 1000000000u)};
    if (timerfd_settime(timer, TFD_TIMER_ABSTIME, &at, NULL)) fail("timerfd_settime");
}

static inline int make_timer(int poll) {
    int timer = timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN | EPOLLET, .data.ptr = NULL};
    if (timer < 0 || epoll_ctl(poll, EPOLL_CTL_ADD, timer, &event)) fail("timer");
    return timer;
}

static inline void raise_open_files(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
}

static inline struct sockaddr_in loopback(int port) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
}

static inline void without_delay(int fd) {
    int one = 1;
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one)) fail("TCP_NODELAY");
}

/* Return where a header's value begins in a head that ends in an empty line, or NULL. */
static inline const char *header(const char *head, size_t length, const char *name) {
    size_t name_length = strlen(name);
    const char *end = head + length;
    for (const char *line = memchr(head, '\n', length); line && ++line < end;
         line = memchr(line, '\n', (size_t)(end - line))) {
        if ((size_t)(end - line) > name_length && line[name_length] == ':' &&
            !strncasecmp(line, name, name_length)) {
            for (line += name_length + 1; *line == ' '; line++) continue;
            return line;
        }
    }
    return NULL;
}

/* A body on its way: of known length, chunked, or until the end of the connection. */
struct body {
    enum { BY_LENGTH, CHUNKED, BY_END } framing;
    enum { IN_SIZE, IN_DATA, AFTER_DATA, IN_TRAILER } chunk;
    uint64_t left;    /* bytes of the body, or of the chunk */
    bool last, blank; /* in the last chunk; at the beginning of a trailer's line */
    bool complete;
};

static inline struct body begin_body(const char *head, size_t length, bool is_response) {
    struct body body = {0};
    const char *value = header(head, length, "transfer-encoding");
    if (value && !strncasecmp(value, "chunked", 7)) {
        body.framing = CHUNKED;
    } else if ((value = header(head, length, "content-length"))) {
        body.left = strtoull(value, NULL, 10);
    } else if (is_response) {
        body.framing = BY_END;
    }
    body.complete = body.framing == BY_LENGTH && !body.left;
    return body;
}

typedef void piece_reader(void *owner, const char *piece, size_t length);

static inline bool chunk_control(struct body *body, char byte) {
    switch (body->chunk) {
    case IN_SIZE:
        if (byte == '\n') {
            body->last = !body->left;
            body->blank = true;
            body->chunk = body->last ? IN_TRAILER : IN_DATA;
        } else if (byte != '\r') {
            int digit = byte >= '0' && byte <= '9' ? byte - '0' : (byte | 32) - 'a' + 10;
            if (digit < 0 || digit > 15) return false;
            body->left = body->left * 16 + (uint64_t)digit;
        }
        return true;
    case AFTER_DATA:
        if (byte == '\n') body->chunk = IN_SIZE;
        return true;
    default: /* IN_TRAILER */
        if (byte == '\n') {
            body->complete = body->blank;
            body->blank = true;
        } else if (byte != '\r') {
            body->blank = false;
        }
        return true;
    }
}

/* Read what came of a body, hand its pieces on, and return how many bytes belonged to it; -1: not chunked. */
static inline ssize_t read_body(struct body *body, const char *data, size_t length, piece_reader *reader,
                                void *owner) {
    size_t at = 0;
    while (at < length && !body->complete) {
        if (body->framing == CHUNKED && body->chunk != IN_DATA) {
            if (!chunk_control(body, data[at++])) return -1;
            continue;
        }
        size_t piece = length - at;
        if (body->framing != BY_END && piece > body->left) piece = body->left;
        reader(owner, data + at, piece);
        at += piece;
        if (body->framing == BY_END) continue;
        body->left -= piece;
        if (body->left) continue;
        if (body->framing == CHUNKED) body->chunk = AFTER_DATA;
        else body->complete = true;
    }
    return (ssize_t)at;
}

#endif
