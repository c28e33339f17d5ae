"""Which token ends a document: valid values of `--eod-token-id`, and its default."""

import re
from dataclasses import replace

import pytest

from megatron.trainer.config.schema import DataConfig
from megatron.trainer.data.batch_views import DocumentRule
from megatron.trainer.errors import ConfigError
from moe_app.pretrain.build import document_rule


@pytest.mark.parametrize("eod", [0, 49])
def test_an_id_of_the_vocabulary_may_end_documents(eod: int) -> None:
    found = document_rule(DataConfig(reset_position_ids=True, eod_token_id=eod), 50)
    assert found == DocumentRule(eod=eod, reset_position_ids=True, reset_attention_mask=False)


def test_without_a_reset_documents_are_not_separated() -> None:
    assert document_rule(DataConfig(), 50) is None


@pytest.mark.parametrize("eod", [-1, 50])
def test_an_id_outside_the_vocabulary_is_refused(eod: int) -> None:
    """It would end no document, and all would be one document without any warning."""
    message = (
        f"the id that ends a document ({eod}) is no token of a vocabulary of 50, so no document"
        " would end; give an --eod-token-id of 0 to 49"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        document_rule(DataConfig(reset_attention_mask=True, eod_token_id=eod), 50)


def test_an_id_without_a_reset_is_refused() -> None:
    message = (
        "--eod-token-id 4 changes nothing without --reset-position-ids or --reset-attention-mask;"
        " give one of them, or drop it"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        document_rule(DataConfig(eod_token_id=4), 50)


def test_a_reset_of_random_tokens_needs_an_id_or_a_tokenizer() -> None:
    message = (
        "--reset-position-ids and --reset-attention-mask need to know which token ends a document,"
        " but random tokens have no index that says it, and there is neither a tokenizer nor an id;"
        " give --tokenizer-model or --eod-token-id"
    )
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        document_rule(DataConfig(reset_attention_mask=True, mock_data=True), 50)


def test_a_reset_of_token_files_needs_no_id() -> None:
    data = DataConfig(reset_attention_mask=True, data_path=("a",), packed_attention="mask")
    found = document_rule(data, 50)
    assert found == DocumentRule(eod=None, reset_position_ids=False, reset_attention_mask=True)
    auto = document_rule(replace(data, packed_attention="auto"), 50)
    assert auto == replace(found, is_varlen=True)
