/*
 * The load generator: many connections on one thread, each with one request at a time.
 *
 *     load port=8080 request=FILE milliseconds=4000 [connections=1] [warm_up_ms=1000] [period_us=0]
 *          [spread_us=0] [read_bytes=0] [read_every_us=0] [receive_buffer=0] [events=0]
 *
 * FILE has one whole HTTP request; the ten digits after "req-" in it are another number in each request.
 * Connection number i begins at i/connections of `spread_us`.  With `period_us` 0 it asks again as soon as it
 * was answered (a closed loop: for capacity).  Otherwise it asks each period, and a request that could not be
 * sent in time, since the one before was not answered, counts from when it was to be sent (an open loop, with
 * no coordinated omission); what is not answered at the end counts with its age.
 * `read_bytes` and `read_every_us` make readers slow; `receive_buffer` bounds what their sockets hold.
 * `events`: how many a whole stream has; one that ends with fewer counts as "short".
 *
 * Prints "measuring" and "measured" when it does, then one line of JSON.  A histogram is a list of
 * [nanoseconds, count], each value within a hundredth of the true one; everything else is of the time between
 * the two words, but for `all_bytes`, which is from the beginning on.
 */
#include "histogram.h"
#include "options.h"
#include "wire.h"

#define HEAD_ROOM 16384
#define AGAIN_NS 10000000u /* after a connection failed */

static struct {
    struct histogram latency, first_byte, event_delay;
    uint64_t statuses[600], events, bytes, all_bytes, broken, cut_short, unfinished, opened;
} results;

enum state { AWAY, CONNECTING, RESTING, SENDING, READING_HEAD, READING_BODY };

struct connection {
    struct timed timed; /* first: what is due is a connection */
    int fd;
    enum state state;
    bool closing, used, paused, body_begun;
    uint32_t watched;
    uint64_t intended_ns, next_ns;
    char number[10];
    size_t sent;
    char head[HEAD_ROOM];
    size_t head_length;
    int status;
    struct body body;
    int digits; /* of a stamp that were read; -1: outside of one */
    uint64_t stamp;
    long events;
};

static int poll_fd;
static struct heap due;
static struct connection *connections;
static char *request;
static size_t request_length, number_at;
static uint64_t next_number, received_ns;
static bool measuring;

/* --- figures ------------------------------------------------------------------------------------------ */

static void count(struct histogram *histogram, uint64_t value) {
    if (measuring) histogram_count(histogram, value);
}

static void print_statuses(void) {
    const char *between = "";
    printf("\"statuses\":{");
    for (int status = 0; status < 600; status++) {
        if (!results.statuses[status]) continue;
        printf("%s\"%d\":%lu", between, status, results.statuses[status]);
        between = ",";
    }
    printf("},");
}

static uint64_t since(uint64_t begin_ns, uint64_t end_ns) {
    return end_ns > begin_ns ? end_ns - begin_ns : 0;
}

/* What is on its way, or late, counts with its age, or the slowest would be missing. */
static void count_unfinished(uint64_t now) {
    for (long at = 0; at < options.connections; at++) {
        struct connection *connection = &connections[at];
        if (connection->state == READING_BODY) results.opened++;
        if (connection->state >= SENDING) {
            results.unfinished++;
            if (!options.period_us) continue;
            count(&results.latency, since(connection->intended_ns, now));
            if (!connection->body_begun) count(&results.first_byte, since(connection->intended_ns, now));
        }
        if (!options.period_us || connection->state == AWAY) continue;
        for (uint64_t late = connection->next_ns; late < now; late += (uint64_t)options.period_us * 1000) {
            count(&results.latency, now - late);
            count(&results.first_byte, now - late);
            results.unfinished++;
        }
    }
}

static void print_results(uint64_t nanoseconds, uint64_t cpu_nanoseconds) {
    printf("{\"nanoseconds\":%lu,\"cpu_nanoseconds\":%lu,", nanoseconds, cpu_nanoseconds);
    print_histogram("latency", &results.latency);
    print_histogram("first_byte", &results.first_byte);
    print_histogram("event_delay", &results.event_delay);
    print_statuses();
    printf("\"events\":%lu,\"bytes\":%lu,\"all_bytes\":%lu,\"broken\":%lu,\"short\":%lu,\"unfinished\":%lu,"
           "\"open\":%lu}\n",
           results.events, results.bytes, results.all_bytes, results.broken, results.cut_short,
           results.unfinished, results.opened);
    fflush(stdout);
}

/* --- one connection ----------------------------------------------------------------------------------- */

static void watch(struct connection *connection, uint32_t events) {
    if (connection->watched == events) return;
    connection->watched = events;
    struct epoll_event event = {.events = events, .data.ptr = connection};
    if (epoll_ctl(poll_fd, EPOLL_CTL_MOD, connection->fd, &event)) fail("epoll_ctl");
}

static void drop(struct connection *connection) {
    if (connection->fd >= 0) close(connection->fd);
    connection->fd = -1;
    connection->state = AWAY;
    heap_remove(&due, &connection->timed);
}

static void broke(struct connection *connection) {
    if (measuring) results.broken++;
    drop(connection);
    heap_add(&due, &connection->timed, now_ns() + AGAIN_NS);
}

static void open_connection(struct connection *connection) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0),
        size = (int)options.receive_buffer;
    if (fd < 0) fail("socket");
    if (size) setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    without_delay(fd);
    struct sockaddr_in address = loopback((int)options.port);
    if (connect(fd, (struct sockaddr *)&address, sizeof address) && errno != EINPROGRESS) fail("connect");
    connection->fd = fd;
    connection->state = CONNECTING;
    connection->used = connection->closing = connection->paused = false;
    connection->watched = EPOLLIN | EPOLLOUT;
    struct epoll_event event = {.events = connection->watched, .data.ptr = connection};
    if (epoll_ctl(poll_fd, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
}

static void send_request(struct connection *connection) {
    struct iovec pieces[3] = {{request, number_at},
                              {connection->number, sizeof connection->number},
                              {request + number_at + 10, request_length - number_at - 10}};
    size_t skip = connection->sent;
    int first = 0;
    for (; first < 3 && skip >= pieces[first].iov_len; first++) skip -= pieces[first].iov_len;
    pieces[first].iov_base = (char *)pieces[first].iov_base + skip;
    pieces[first].iov_len -= skip;
    struct msghdr message = {.msg_iov = pieces + first, .msg_iovlen = (size_t)(3 - first)};
    ssize_t sent = sendmsg(connection->fd, &message, MSG_NOSIGNAL);
    if (sent < 0 && errno != EAGAIN) {
        broke(connection);
        return;
    }
    connection->sent += sent > 0 ? (size_t)sent : 0;
    if (connection->sent < request_length) {
        connection->state = SENDING;
        watch(connection, EPOLLIN | EPOLLOUT);
    } else {
        connection->state = READING_HEAD;
        watch(connection, EPOLLIN);
    }
}

static void number(struct connection *connection) {
    uint64_t value = next_number++;
    for (int at = 9; at >= 0; at--, value /= 10) connection->number[at] = (char)('0' + value % 10);
}

/* Ask; the connection is there. */
static void ask(struct connection *connection) {
    connection->sent = connection->head_length = 0;
    connection->body_begun = false;
    connection->digits = -1;
    connection->events = 0;
    send_request(connection);
}

/* It is time for the next request. */
static void begin(struct connection *connection) {
    uint64_t now = now_ns();
    connection->intended_ns = options.period_us ? connection->next_ns : now;
    connection->next_ns = connection->intended_ns + (uint64_t)options.period_us * 1000;
    number(connection);
    if (connection->state == AWAY) open_connection(connection);
    else ask(connection);
}

static void finished(struct connection *connection) {
    count(&results.latency, since(connection->intended_ns, received_ns));
    if (measuring) {
        results.statuses[connection->status]++;
        if (connection->status == 200 && connection->events < options.events) results.cut_short++;
    }
    connection->state = RESTING;
    connection->used = true;
    if (connection->closing || connection->body.framing == BY_END) drop(connection);
    if (options.period_us && connection->next_ns > received_ns)
        heap_add(&due, &connection->timed, connection->next_ns);
    else begin(connection);
}

static void body_piece(void *owner, const char *piece, size_t length) {
    struct connection *connection = owner;
    results.all_bytes += length;
    if (measuring) results.bytes += length;
    if (!connection->body_begun) {
        connection->body_begun = true;
        count(&results.first_byte, since(connection->intended_ns, received_ns));
    }
    for (const char *end = piece + length; piece < end; piece++) {
        if (connection->digits < 0) {
            if (!(piece = memchr(piece, '@', (size_t)(end - piece)))) return;
            connection->digits = 0;
            connection->stamp = 0;
        } else if (*piece < '0' || *piece > '9') {
            connection->digits = -1;
        } else {
            connection->stamp = connection->stamp * 10 + (uint64_t)(*piece - '0');
            if (++connection->digits < STAMP_DIGITS) continue;
            connection->digits = -1;
            if (!connection->stamp) continue; /* a plain answer has no time in it */
            connection->events++;
            if (measuring) results.events++;
            count(&results.event_delay, since(connection->stamp, received_ns));
        }
    }
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
        if (taken < length) broke(connection);
        return length;
    }
    size_t head_length = (size_t)(end - connection->head) + 4;
    connection->head[head_length] = 0;
    connection->head_length = 0;
    connection->status = atoi(connection->head + 9) % 600;
    if (connection->status < 200) return head_length - before;
    const char *kept = header(connection->head, head_length, "connection");
    if (kept && !strncasecmp(kept, "close", 5)) connection->closing = true;
    connection->body = begin_body(connection->head, head_length, true);
    connection->state = READING_BODY;
    return head_length - before;
}

/* The peer closed the connection, orderly or not. */
static void hung_up(struct connection *connection) {
    if (connection->state == READING_BODY && connection->body.framing == BY_END) {
        connection->body.complete = true;
        finished(connection);
    } else if (connection->state == RESTING) {
        uint64_t next = connection->timed.due_ns;
        drop(connection);
        heap_add(&due, &connection->timed, next);
    } else if (connection->used && connection->state <= READING_HEAD && !connection->head_length) {
        /* It was kept a moment too long: nobody's fault, the same request goes out again. */
        drop(connection);
        open_connection(connection);
    } else {
        broke(connection);
    }
}

static void pause_reading(struct connection *connection) {
    connection->paused = true;
    watch(connection, 0);
    heap_add(&due, &connection->timed, received_ns + (uint64_t)options.read_every_us * 1000);
}

static void receive(struct connection *connection) {
    static char data[1 << 18];
    ssize_t length =
        recv(connection->fd, data, options.read_bytes ? (size_t)options.read_bytes : sizeof data, 0);
    if (length < 0 && errno == EAGAIN) return;
    received_ns = now_ns();
    if (length <= 0) {
        hung_up(connection);
        return;
    }
    size_t at = 0;
    while (at < (size_t)length && connection->state == READING_HEAD)
        at += read_head(connection, data + at, (size_t)length - at);
    if (connection->state == SENDING || connection->state == RESTING) {
        broke(connection); /* an answer to a question that was not asked yet: 413 and its like */
    } else if (connection->state == READING_BODY) {
        if (read_body(&connection->body, data + at, (size_t)length - at, body_piece, connection) < 0)
            broke(connection);
        else if (connection->body.complete) finished(connection);
        else if (options.read_every_us) pause_reading(connection);
    }
}

static void connected(struct connection *connection) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(connection->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) broke(connection);
    else ask(connection);
}

static void happened(struct connection *connection, uint32_t events) {
    if (connection->state == AWAY) return;
    if (connection->state == CONNECTING) connected(connection);
    else if (events & EPOLLOUT && connection->state == SENDING) send_request(connection);
    else if (events & ~(uint32_t)EPOLLOUT) receive(connection);
}

static void its_time(struct connection *connection) {
    if (connection->paused) {
        connection->paused = false;
        watch(connection, EPOLLIN);
    } else {
        begin(connection);
    }
}

/* --- the whole ---------------------------------------------------------------------------------------- */

static void read_request(void) {
    FILE *file = fopen(options.request, "rb");
    if (!file) fail(options.request);
    fseek(file, 0, SEEK_END);
    request_length = (size_t)ftell(file);
    rewind(file);
    request = checked(malloc(request_length));
    if (fread(request, 1, request_length, file) != request_length) fail(options.request);
    fclose(file);
    char *mark = memmem(request, request_length, "req-0000000000", 14);
    if (!mark) {
        fprintf(stderr, "%s: no req-0000000000 in it\n", options.request);
        exit(2);
    }
    number_at = (size_t)(mark - request) + 4;
    /* Other numbers than in any run before: there are fewer requests than microseconds. */
    next_number = now_ns() / 1000 % 10000000000u;
}

static void make_connections(uint64_t start) {
    connections = checked(calloc((size_t)options.connections, sizeof *connections));
    for (long at = 0; at < options.connections; at++) {
        connections[at].fd = -1;
        connections[at].next_ns =
            start + (uint64_t)options.spread_us * 1000 * (uint64_t)at / (uint64_t)options.connections;
        heap_add(&due, &connections[at].timed, connections[at].next_ns);
    }
}

int main(int given, char **arguments) {
    read_options(given, arguments);
    raise_open_files();
    read_request();
    struct epoll_event events[512];
    if ((poll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0) fail("epoll");
    int timer = make_timer(poll_fd);
    uint64_t cpu_began = 0, start = now_ns(), began = start + (uint64_t)options.warm_up_ms * 1000000u;
    uint64_t ended = began + (uint64_t)options.milliseconds * 1000000u;
    struct timed marks[2];
    memset(marks, 0, sizeof marks);
    make_connections(start);
    heap_add(&due, &marks[0], began);
    heap_add(&due, &marks[1], ended);
    for (;;) {
        arm(timer, &due);
        int count_of_events = epoll_wait(poll_fd, events, 512, -1);
        for (int at = 0; at < count_of_events; at++)
            if (events[at].data.ptr) happened(events[at].data.ptr, events[at].events);
        for (struct timed *timed; (timed = heap_take(&due, now_ns()));) {
            if (timed == &marks[0]) {
                measuring = true;
                began = now_ns();
                cpu_began = cpu_ns();
                announce("measuring");
            } else if (timed == &marks[1]) {
                ended = now_ns();
                announce("measured");
                count_unfinished(ended);
                print_results(ended - began, cpu_ns() - cpu_began);
                return 0;
            } else {
                its_time((struct connection *)timed);
            }
        }
    }
}
