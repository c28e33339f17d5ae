"""Tokenizes the kept documents of a file, as preprocessing does."""

import argparse
import contextlib
import dataclasses
import io

from datatrove.pipeline.base import PipelineStep

from megatron.trainer.data.token_manifest import identify_tokenizer
from moe_app.data.encoding import open_tokenizer
from moe_app.data.text_inputs import cut_shard, find_inputs
from moe_app.data.token_work import TokenWork, digest, write_tokens
from moe_app.filter.filter_plan import FilterPlan
from moe_app.filter.pipeline.document_filters import check_tokenizer
from moe_app.filter.pipeline.reading import Documents
from moe_app.filter.work_folder import WorkFolder


class TokenWriter(PipelineStep):
    """Writes one shard of token files: the documents of the file of a task's number.

    All shards together, merged by preprocessing, are what it makes of all kept files in order.
    """

    type = "WRITER"
    name = "token files"

    def __init__(self, plan: FilterPlan, folder: WorkFolder) -> None:
        super().__init__()
        self.plan = plan
        self.folder = folder

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the shard, from where a start that was killed ended.

        Raises:
            UserError: The tokenizer is another one than the plan's, or nothing can be written.
        """
        tokens, tokenizer = self.plan.tokens, self.plan.tokenizer
        assert tokens is not None and tokenizer is not None
        check_tokenizer(tokenizer)
        path = self.folder.kept / f"{self.plan.sources[rank].name}.jsonl"
        args = argparse.Namespace(
            input=[str(path)],
            output_prefix=str(self.folder.tokens / "kept"),
            output_key=None,
            tokenizer_type=tokenizer.type,
            tokenizer_model=tokenizer.model,
            append_eod=tokens.append_eod,
            eod_token=tokens.eod_token,
            workers=1,
            max_bad_lines=0,
            num_shards=len(self.plan.sources),
            shard_index=rank,
        )
        inputs = find_inputs(args.input)
        plan = dataclasses.replace(self.plan, max_bad_lines=0)
        work = TokenWork(
            args=args,
            key=self.plan.text_key,
            inputs=inputs,
            segments=cut_shard(inputs, index=0, count=1),
            inputs_sha256=digest(repr(plan)),
            num_inputs=len(self.plan.sources),
            texts={},
            tokenizer=open_tokenizer(args),
            identity=identify_tokenizer(tokenizer.type, tokenizer.model),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            write_tokens(work)
