"""Frozen dataclasses that describe a run, one per group of ``conf/``. No torch, no logic: ``rules/`` has the rules.

A config is composed once, checked once, and never changed afterwards. ``None`` always means "derived from something
else", and the docstring of the field says from what.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Run:
    """Identity of a run; ``dir/name`` is its folder."""

    name: str
    """Stable name: running it again resumes it. Never a timestamp, or a requeued job would not find itself."""
    dir: str = "runs"
    """Folder that holds all runs."""
    seed: int = 1234
    """Decides initial weights and data order, independently of the layout."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How ``megalm train`` starts ranks when no launcher (torchrun, srun, mpirun) has."""

    ranks: int = 0
    """Processes to start on this machine; 0: as many as tp·pp·cp."""
    device: str = "auto"
    """``auto`` (CUDA when there is one device per local rank, else CPU), ``cpu`` or ``cuda``."""
    threads_per_rank: int = 1
    """OMP threads of each rank that megalm starts itself; fixed, because sums depend on it in the last bit."""
    timeout_seconds: int = 600
    """Longest that one collective may take before the run is given up."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Degrees of parallelism; the data-parallel degree is ranks / (tp·pp·cp)."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    virtual_stages: int = 1
    """Stages per pipeline rank (Narayanan et al. 2021, interleaved schedule)."""
    schedule: str = "1f1b"
    """Pipeline schedule: ``gpipe``, ``1f1b``, ``interleaved_1f1b`` (with virtual_stages above 1) or ``zb_h1`` (zero
    bubble, Qi et al. 2024)."""
    stage_layers: tuple[int, ...] | None = None
    """Layers of each stage, in order; None: balanced by cost, embedding and head counted."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel regions (Korthikanti et al. 2022)."""
    cp_attention: str = "ulysses"
    """How attention sees the whole sequence where cp splits it: ``ulysses`` (all-to-all over heads, Jacobs et al.
    2023) or ``ring`` (keys and values travel round, Liu et al. 2023)."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """Architecture of a Transformer: a decoder (GPT), or an encoder (BERT)."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention, Ainslie et al. 2023); None: as many as ``num_heads``."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP; None: 4·hidden_size for GELU, 8/3·hidden_size rounded up to 64 for SwiGLU."""
    vocab_size: int | None = None
    """None: the vocabulary of the data."""
    sequence_length: int
    causal: bool = True
    """A token sees none after it (GPT); false: it sees the whole sequence (BERT)."""
    position: str = "learned"
    """``learned`` absolute positions (GPT-2) or ``rotary`` (Su et al. 2021)."""
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    """Share of each head's elements that is rotated (GPT-NeoX: 0.25)."""
    rotary_scaling: str = "none"
    """How a trained context is stretched: ``none``, ``linear`` (Chen et al. 2023), ``llama3`` or ``yarn`` (Peng et al.
    2023)."""
    rotary_factor: float = 1.0
    """How many times longer than the original context the scaled one is."""
    rotary_original_length: int | None = None
    """Context that the unscaled model was trained with; None: sequence_length / rotary_factor."""
    rotary_low_frequency_factor: float = 1.0
    """``llama3``: wavelengths above original_length / this are stretched in full."""
    rotary_high_frequency_factor: float = 4.0
    """``llama3``: wavelengths below original_length / this stay as they are."""
    rotary_beta_fast: float = 32.0
    """``yarn``: elements that turn more often than this within the original length stay as they are."""
    rotary_beta_slow: float = 1.0
    """``yarn``: elements that turn less often than this are stretched in full."""
    attention_windows: tuple[int, ...] = (0,)
    """Tokens that a query sees, itself included, by layer in rotation; 0: all before it. GPT-3's alternating dense and
    locally banded layers are ``[0, 128]`` (Child et al. 2019; Brown et al. 2020 do not state the band's width)."""
    qk_norm: bool = False
    """Normalise each query and key head before their product (Henry et al. 2020)."""
    residual: str = "pre_norm"
    """Wiring of a block: ``pre_norm`` (GPT-2), ``post_norm`` (BERT) or ``parallel`` (GPT-NeoX)."""
    token_types: int = 0
    """Rows of a token-type embedding that is added to the word embedding (BERT: 2); 0: none."""
    embedding_norm: bool = False
    """Normalise the sum of embeddings (BERT)."""
    dropout: float = 0.0
    """Dropout on the embedding and on what each sublayer adds to the residual stream."""
    attention_dropout: float = 0.0
    """Dropout on attention probabilities."""
    norm: str = "layernorm"
    """``layernorm`` or ``rmsnorm`` (Zhang & Sennrich 2019)."""
    norm_epsilon: float = 1e-5
    activation: str = "gelu"
    """``gelu`` (tanh approximation, as GPT-2), ``gelu_erf`` (exact, as BERT) or ``swiglu`` (Shazeer 2020)."""
    bias: bool = True
    """Biases on linear layers and on LayerNorm."""
    qkv_bias: bool | None = None
    """Bias on query, key and value alone (Qwen2: true where bias is false); None: as ``bias``."""
    tie_embeddings: bool = True
    """The output projection is the word embedding."""
    head: str = "linear"
    """What makes logits of the last hidden vectors: ``linear``; or ``masked_lm``, with a dense layer, GELU and norm
    before it and a bias per word (Devlin et al. 2019)."""
    init_std: float = 0.02
    """Standard deviation of initial weights; residual projections use it divided by sqrt(2·num_layers) (GPT-2)."""

    @property
    def kv_heads(self) -> int:
        """Key/value heads, derived where the config leaves them open."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Elements of one head."""
        return self.hidden_size // self.num_heads

    @property
    def has_qkv_bias(self) -> bool:
        """Whether query, key and value have a bias."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    def attention_window(self, layer: int) -> int:
        """Tokens that a query of this layer sees, itself included; 0: all before it."""
        return self.attention_windows[layer % len(self.attention_windows)]

    @property
    def ffn_size(self) -> int:
        """Inner width of the MLP, derived where the config leaves it open."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        if self.activation == "swiglu":
            return -(-8 * self.hidden_size // 3 // 64) * 64
        return 4 * self.hidden_size


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is learnt from the tokens."""

    name: str = "clm"
    """``clm``: predict the next token; where the data have a loss mask, only what it names. ``sft``: the same, on data
    that have a mask (completions of prompts). ``mlm``: recover masked tokens (Devlin et al. 2019)."""
    mask_probability: float = 0.15
    """``mlm``: share of tokens that are to be recovered; of them 80 % are masked, 10 % replaced, 10 % left."""
    whole_words: bool = False
    """``mlm``: mask words instead of their parts."""
    z_loss: float = 0.0
    """Weight of the squared log-partition of the logits, which keeps them from drifting (Chowdhery et al. 2022: 1e-4).
    Reported losses leave it out."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Token shards and the order in which they are read."""

    path: tuple[str, ...]
    """One or more prepared datasets, as ``megalm prepare`` writes them: a folder with ``train/`` and ``val/``,
    the ``http(s)://`` address of one, or ``pipe:COMMAND``, which prints the file whose name replaces ``{file}``."""
    weights: tuple[float, ...] = ()
    """Share of each dataset in the samples, relative to the others; empty: as they are large."""
    max_epochs: tuple[float, ...] = ()
    """How often the run may read each dataset at most (0: any number); empty: no limits."""
    phase: int = 0
    """Counts deliberate changes of the data: a resumed run whose phase is higher than its checkpoint's reads the new
    data from their beginning. Within a phase a change is refused."""
    reset_at_documents: bool = False
    """A token sees its own document only, and positions begin anew with each, where a sequence holds several."""
    cache_dir: str | None = None
    """Where shards that a ``pipe:`` fetches are kept; None: in the system's folder for temporary files."""
    cache_gib: float = 50.0
    """Most that the cache holds; the shards used longest ago go first."""
    block_sequences: int = 1
    """Sequences read contiguously: the grain of shuffling and of input/output; 1 shuffles single sequences."""
    lanes: int = 1
    """Sample g belongs to lane ``g mod lanes``; each lane has its own stream of blocks."""
    window_blocks: int = 1
    """Blocks mixed together inside a lane."""
    prefetch_batches: int = 2
    """Batches that a background thread keeps ready."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW (Loshchilov & Hutter 2019), its learning-rate schedule, and clipping."""

    lr: float
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Applied to matrices only: norms and biases are spared."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    schedule: str = "cosine"
    """``cosine``, ``linear``, ``constant`` or ``wsd`` (warm-up, stable, decay: Hu et al. 2024), after a linear
    warm-up."""
    warmup_tokens: int = 0
    decay_tokens: int | None = None
    """Tokens after which the decay ends, counted from the start; None: all tokens of the run."""
    cooldown_tokens: int | None = None
    """``wsd``: length of the decay phase, which ends at ``decay_tokens``; None: a tenth of the run."""
    cooldown: str = "linear"
    """``wsd``: shape of the decay, ``linear`` or ``sqrt`` (1 − √progress, Hägele et al. 2024)."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the decay, relative to the peak."""
    rewarm_tokens: int | None = None
    """Of a run that is resumed: tokens over which the rate rises from where it stands to ``lr`` again; a decay is then
    planned to the end of the run. It is done once: a checkpoint whose config has the same number has begun it."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Numeric format and ZeRO stage (Rajbhandari et al. 2020)."""

    dtype: str = "bf16"
    """``fp32``, or ``bf16`` or ``fp16`` with fp32 masters and fp32 gradient accumulation."""
    zero_stage: int = 1
    offload_optimizer: bool = False
    """Keep masters and moments in host memory and update them there."""
    initial_loss_scale: float = 65536.0
    """``fp16``: first value of the dynamic loss scale (Micikevicius et al. 2018)."""
    loss_scale_window: int = 1000
    """``fp16``: steps without an overflow after which the loss scale doubles."""
    bucket_mib: float = 32.0
    """Gradients of at least this many MiB are reduced over replicas at once, while backward goes on."""
    recompute: str = "none"
    """Activations that backward computes again instead of keeping them: ``none``, ``selective`` (the attention core)
    or ``full`` (whole blocks; Chen et al. 2016, Korthikanti et al. 2022)."""
    recompute_every: int = 1
    """Recompute every k-th block of a stage; 1: all."""
    compile: bool = False
    """``torch.compile`` each block."""
    loss_chunk_tokens: int = 2048
    """Tokens whose fp32 logits exist at one time in the cross entropy; 0: all of a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save, what to keep, and what to start from."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: none for that reason."""
    every_minutes: float = 0.0
    """A checkpoint after the step at which so many minutes have passed since the last one; 0: none for that reason."""
    keep_last: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0: none for that reason."""
    keep_best: int = 0
    """Checkpoints of the lowest validation loss kept, among those saved at a step that was validated."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory: of one rank's share of masters and
    moments. False: training waits, and there is no copy."""
    on_failure: str = "continue"
    """What a checkpoint that a full or failing disk does not take does to the run: ``continue`` trains on and the next
    save tries again; ``stop`` ends it with exit code 3. Any other failure ends it, and so does that of the last
    checkpoint, unless the job is to be queued again and there is an older one."""
    resume: str = "auto"
    """``auto``: the newest complete checkpoint of this run, if it has any; ``never``: refuse a run that has some;
    or the path of a checkpoint, which must load. Later checkpoints of the run are then set aside; once it has saved
    since, the same command goes on from there."""
    init_from: str | None = None
    """Path of a checkpoint whose weights (only) a fresh run starts from."""
    finetune_from: str | None = None
    """The same, for training on other data: ``data.phase`` must be above the checkpoint's, so that order and record of
    the data tell one phase from the other."""
    extend_vocab: bool = False
    """Whether a run that begins with another's weights may have more words: the rows of the embeddings are kept, and
    those of tokens that were added to the tokenizer begin as in a fresh model."""


@dataclass(frozen=True, kw_only=True)
class Logging:
    """Where metrics go besides ``metrics.jsonl``, which is always written."""

    wandb: str = "auto"
    """``auto`` (online where an API key is set, else offline), ``online``, ``offline`` or ``disabled``."""
    wandb_project: str = "megalm"
    wandb_entity: str | None = None
    """User or team whose project it is; None: W&B's default for the API key."""
    wandb_group: str | None = None
    """Name under which W&B shows several runs together."""
    wandb_tags: tuple[str, ...] | None = None
    """Words by which W&B filters runs."""
    wandb_notes: str | None = None
    """Text that W&B shows beside the run."""
    tensorboard: bool = True
    every: int = 1
    """Steps between lines on a console that is not a terminal; ``metrics.jsonl`` has every step."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machine that a job is planned for; ``gpus`` is what ``megalm check`` validates a layout against."""

    name: str = "local"
    gpus: int = 0
    """Total GPUs of the job; 0: as many as ranks are started."""
    gpus_per_node: int = 8
    gpu: str | None = None
    """Key into ``hardware.yaml``; None: detected, and MFU is null when the device is unknown."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Length and batch of a run."""

    steps: int
    micro_batch_size: int
    """Sequences per forward pass of one replica."""
    global_batch_size: int
    """Sequences per optimizer step over all replicas; the last value of a ramp."""
    batch_ramp_start: int | None = None
    """First global batch size of a linear ramp (Brown et al. 2020); None: no ramp."""
    batch_ramp_increment: int | None = None
    """Sequences by which the batch grows at each stage of the ramp; None: batch_ramp_start."""
    batch_ramp_tokens: int = 0
    """Tokens over which the ramp rises from its start to global_batch_size."""
    validate_every: int = 0
    """Steps between validations; 0: only at the end."""
    validation_samples: int = 256
    """Sequences per validation; at the end of a run, and in ``megalm evaluate``, the whole split is used."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a finished run leaves for a human: a loss curve and a sample."""

    plot: bool = True
    """Write ``loss.png`` into the run folder."""
    prompt: str | None = None
    """Text that the finished model continues; None: no sample."""
    max_new_tokens: int = 120
    temperature: float = 0.8
    top_k: int = 40


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a run is determined by."""

    run: Run
    model: Model
    data: Data
    optim: Optim
    train: Train
    launch: Launch = field(default_factory=Launch)
    parallel: Parallel = field(default_factory=Parallel)
    objective: Objective = field(default_factory=Objective)
    engine: Engine = field(default_factory=Engine)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    logging: Logging = field(default_factory=Logging)
    cluster: Cluster = field(default_factory=Cluster)
    report: Report = field(default_factory=Report)
