"""The receipt of a request that is over, made from its record alone."""

from __future__ import annotations

import msgspec

from crabtwist.money import PriceRow
from crabtwist.pricing import Line, PriceBook, Receipt, receipt, reserved_lines
from crabtwist.records import Record, Tokens

#: Stands on a receipt of one line: the record had no room for all that its cost was made of.
NOT_ITEMISED = "not itemised"


def receipt_of(record: Record) -> Receipt:
    """
    Return the arithmetic of a record's cost.

    Its total is the record's cost, unless that is None; then there are only the lines of what has a price.
    The estimate for an interrupted request is itemised as it was made: each token at its dearest rate.
    """
    try:
        itemised = _itemised(record)
    except msgspec.ValidationError:
        itemised = Receipt(())
    if record.cost is None or (itemised.total == record.cost and not itemised.unpriced):
        return itemised
    model = record.model_answered or record.upstream_model or record.model
    return Receipt((Line(model, NOT_ITEMISED, 1, record.cost),))


def _itemised(record: Record) -> Receipt:
    if record.usage is None:
        return Receipt(())
    if record.estimated:
        return _estimate(record.price, record.usage)
    return receipt(record.usage.values, record.price, PriceBook(overrides=record.other_prices), "")


def _estimate(row: PriceRow | None, tokens: Tokens) -> Receipt:
    if row is None:
        return Receipt((), ("model",))
    return Receipt(reserved_lines(row, tokens.input_tokens, tokens.output_tokens))
