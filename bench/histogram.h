/*
 * A histogram whose buckets grow with their values: sixty-four for each doubling, exact below 128.
 */
#ifndef BENCH_HISTOGRAM_H
#define BENCH_HISTOGRAM_H

#include "wire.h"

#define BUCKETS 4096

struct histogram {
    uint64_t counts[BUCKETS];
};

static void histogram_count(struct histogram *histogram, uint64_t value) {
    size_t bucket = value;
    if (value >= 128) {
        size_t exponent = (size_t)(63 - __builtin_clzll(value)) - 6;
        bucket = exponent * 64 + (value >> exponent);
    }
    histogram->counts[bucket]++;
}

/* Print it as a member of a JSON object: a list of [middle of the bucket, count]. */
static void print_histogram(const char *name, const struct histogram *histogram) {
    const char *between = "";
    printf("\"%s\":[", name);
    for (size_t bucket = 0; bucket < BUCKETS; bucket++) {
        if (!histogram->counts[bucket]) continue;
        size_t exponent = bucket < 128 ? 0 : bucket / 64 - 1;
        uint64_t middle = ((bucket - exponent * 64) << exponent) + ((1ull << exponent) >> 1);
        printf("%s[%lu,%lu]", between, middle, histogram->counts[bucket]);
        between = ",";
    }
    printf("],");
}

#endif
