"""
Boards in Redis: each a hash of members to notes, any number of them in one script and one short reply.

txredisapi takes a reply apart line by line, and copies what is left of it each time.  So a script tells
what it found as one string: a line of how many notes each board has, one of how long all members and notes
are, and these, one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate, islice, pairwise

from crabtwist.storage.migrations import Boards

_TELL = """
local counts, sizes, texts = {}, {}, {}
local function add(board)
    counts[#counts + 1] = #board / 2
    for _, text in ipairs(board) do
        sizes[#sizes + 1] = #text
        texts[#texts + 1] = text
    end
end
local function tell()
    return table.concat(counts, ' ') .. '\\n' .. table.concat(sizes, ' ') .. '\\n' .. table.concat(texts)
end
"""

#: Puts the notes of `ARGV[3]` and so on to the boards of the keys; `ARGV[1]` is the member, `ARGV[2]` the
#: time to live in milliseconds, or empty.
POST = f"""
{_TELL}
local member, ttl = ARGV[1], ARGV[2]
for number, key in ipairs(KEYS) do
    redis.call('HSET', key, member, ARGV[number + 2])
    add(redis.call('HGETALL', key))
    if ttl == '' then redis.call('PERSIST', key) else redis.call('PEXPIRE', key, ttl) end
end
return tell()
"""

#: Tells the boards of the keys.
READ = f"""
{_TELL}
for _, key in ipairs(KEYS) do add(redis.call('HGETALL', key)) end
return tell()
"""


def told(keys: Iterable[bytes], reply: bytes) -> Boards:
    """Return what a script told about these keys."""
    counts, sizes, text = reply.split(b"\n", 2)
    ends = accumulate(map(int, sizes.split()), initial=0)
    texts = iter([text[begin:end] for begin, end in pairwise(ends)])
    notes = zip(texts, texts, strict=True)
    return {key: dict(islice(notes, int(count))) for key, count in zip(keys, counts.split(), strict=True)}
