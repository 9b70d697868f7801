/*
 * What the load generator is told to do: NAME=VALUE on its command line, as its head describes.
 */
#ifndef BENCH_OPTIONS_H
#define BENCH_OPTIONS_H

#include "wire.h"

static struct {
    long port, milliseconds, connections, warm_up_ms, period_us, spread_us;
    long read_bytes, read_every_us, receive_buffer, events;
    const char *request;
} options = {.connections = 1, .warm_up_ms = 1000};

static void read_options(int given, char **arguments) {
    const struct {
        const char *name;
        long *value;
    } known[] = {{"port", &options.port},
                 {"connections", &options.connections},
                 {"milliseconds", &options.milliseconds},
                 {"warm_up_ms", &options.warm_up_ms},
                 {"period_us", &options.period_us},
                 {"spread_us", &options.spread_us},
                 {"read_bytes", &options.read_bytes},
                 {"read_every_us", &options.read_every_us},
                 {"receive_buffer", &options.receive_buffer},
                 {"events", &options.events}};
    for (int at = 1; at < given; at++) {
        char *equals = strchr(arguments[at], '=');
        size_t length = equals ? (size_t)(equals - arguments[at]) : 0, option = 0;
        if (length == 7 && !strncmp(arguments[at], "request", 7)) {
            options.request = equals + 1;
            continue;
        }
        for (; option < sizeof known / sizeof *known; option++)
            if (length == strlen(known[option].name) && !strncmp(arguments[at], known[option].name, length))
                break;
        if (option == sizeof known / sizeof *known) {
            fprintf(stderr, "%s: no such option\n", arguments[at]);
            exit(2);
        }
        *known[option].value = strtol(equals + 1, NULL, 10);
    }
    if (!options.port || !options.request || !options.milliseconds || options.connections < 1) {
        fprintf(stderr, "load port=N request=FILE milliseconds=N ...\n");
        exit(2);
    }
}

#endif
