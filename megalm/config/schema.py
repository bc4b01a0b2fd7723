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
    """Name of the run: the same name resumes it. Not a timestamp, or a requeued job would not find its folder."""
    dir: str = "runs"
    """Folder that holds all runs."""
    seed: int = 1234
    """Seed of initial weights, data order and dropout; the layout does not change them."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How ``megalm train`` starts ranks when no launcher (torchrun, srun, mpirun) has."""

    ranks: int = 0
    """Processes to start on this machine; 0: as many as tp·pp·cp."""
    device: str = "auto"
    """``cpu``, ``cuda`` (one GPU per rank), or ``auto``: ``cuda`` where machines have GPUs, and else ``cpu``. GPUs that
    do not suit the ranks are refused, never left idle."""
    threads_per_rank: int = 1
    """OpenMP threads of each rank that megalm starts itself. Fixed, because sums depend on it in the last bit."""
    timeout_seconds: int = 600
    """Timeout of one collective, after which the run fails."""


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Degrees of parallelism; the data-parallel degree is ranks / (tp·pp·cp)."""

    tp: int = 1
    """Tensor-parallel degree."""
    pp: int = 1
    """Pipeline-parallel degree."""
    cp: int = 1
    """Context-parallel degree."""
    virtual_stages: int = 1
    """Pipeline stages per rank (Narayanan et al. 2021, interleaved schedule)."""
    schedule: str = "1f1b"
    """Pipeline schedule: ``gpipe``, ``1f1b``, ``interleaved_1f1b`` (with virtual_stages above 1) or ``zb_h1`` (zero
    bubble, Qi et al. 2024)."""
    stage_layers: tuple[int, ...] | None = None
    """Number of layers of each stage; None: balanced by cost, embedding and head included."""
    sequence_parallel: bool = False
    """Split activations along the sequence between tensor-parallel regions (Korthikanti et al. 2022)."""
    early_receives: bool | None = None
    """Post the receives of a pipeline before the work of their tick, so that transfers run during it. None: on CPUs; to
    be on for GPUs once ``tests/gpu`` has passed on several."""
    tp_overlap_parts: int = 1
    """Parts in which a tensor-parallel layer computes, so that the collective of one part runs during the product of
    another; 1: whole. Numbers change in their last bits at most. For GPUs, where it has not been timed yet."""
    cp_attention: str = "ulysses"
    """How attention sees the whole sequence where cp splits it: ``ulysses`` (all-to-all over heads, Jacobs et al.
    2023) or ``ring`` (keys and values travel round, Liu et al. 2023)."""

    @property
    def overlaps(self) -> bool:
        """Whether transfers or collectives of layers were asked to run during the work of others."""
        return bool(self.early_receives) or self.tp_overlap_parts > 1


@dataclass(frozen=True, kw_only=True)
class Model:
    """Architecture of a Transformer: a decoder (GPT), or an encoder (BERT)."""

    num_layers: int
    """Transformer blocks."""
    hidden_size: int
    """Width of the residual stream; divisible by num_heads where head_dim is None."""
    num_heads: int
    """Attention (query) heads."""
    head_dim: int | None = None
    """Elements of one head (Qwen3 0.6B: 128, with 16 heads on a width of 1024); None: hidden_size / num_heads."""
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention, Ainslie et al. 2023); None: as many as ``num_heads``."""
    ffn_hidden_size: int | None = None
    """Inner width of the MLP; None: 4·hidden_size for GELU, 8/3·hidden_size rounded up to 64 for SwiGLU."""
    vocab_size: int | None = None
    """None: the vocabulary of the data."""
    sequence_length: int
    """Tokens per training sequence: the context length."""
    causal: bool = True
    """Causal attention (GPT); false: bidirectional (BERT)."""
    position: str = "learned"
    """``learned`` absolute positions (GPT-2) or ``rotary`` (Su et al. 2021)."""
    position_offset: int = 0
    """``learned``: rows of the embedding before the one of the first token, which no token uses (RoBERTa: 2)."""
    rotary_base: float = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: float = 1.0
    """Share of each head's elements that is rotated (GPT-NeoX: 0.25)."""
    rotary_scaling: str = "none"
    """How rotary positions are scaled to a longer context: ``none``, ``linear`` (Chen et al. 2023), ``llama3`` or
    ``yarn`` (Peng et al. 2023)."""
    rotary_factor: float = 1.0
    """Scaled context length / original context length."""
    rotary_original_length: int | None = None
    """Original context length; None: sequence_length / rotary_factor."""
    rotary_low_frequency_factor: float = 1.0
    """``llama3``: wavelengths above original_length / this value are scaled by the full factor."""
    rotary_high_frequency_factor: float = 4.0
    """``llama3``: wavelengths below original_length / this value are not scaled."""
    rotary_beta_fast: float = 32.0
    """``yarn``: dimensions with more rotations than this within the original length are not scaled."""
    rotary_beta_slow: float = 1.0
    """``yarn``: dimensions with fewer rotations than this are scaled by the full factor."""
    attention_windows: tuple[int, ...] = (0,)
    """Attention window in tokens (the query included), per layer in rotation; 0: full attention. GPT-3's alternating
    dense and locally banded layers are ``[0, 128]`` (Child et al. 2019; Brown et al. 2020 do not state the band's
    width)."""
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
    """Added to the variance in norms."""
    activation: str = "gelu"
    """``gelu`` (tanh approximation, as GPT-2), ``gelu_erf`` (exact, as BERT) or ``swiglu`` (Shazeer 2020)."""
    bias: bool = True
    """Biases on linear layers and on LayerNorm, where the three settings below do not say otherwise."""
    qkv_bias: bool | None = None
    """Bias on query, key and value (Qwen2: true where bias is false); None: as ``bias``."""
    projection_bias: bool | None = None
    """Bias on attention's output projection (Llama with ``attention_bias``: as qkv_bias); None: as ``bias``."""
    norm_bias: bool | None = None
    """Bias on LayerNorm; None: as ``bias``. RMSNorm has none."""
    tie_embeddings: bool = True
    """Share weights between word embedding and output projection."""
    head: str = "linear"
    """Output head: ``linear``, or ``masked_lm``, with a dense layer, GELU and norm
    before it and a bias per word (Devlin et al. 2019)."""
    vocab_pad_multiple: int = 128
    """Each tensor-parallel rank holds so many rows of the vocabulary that this divides their number: products with an
    odd number of rows miss a GPU's fast path. The rows added are zero, never trained, never saved, and change no number
    on the CPU, which leaves them out of its products."""
    init_std: float = 0.02
    """Standard deviation of initial weights; residual projections use it divided by sqrt(2·num_layers) (GPT-2)."""

    @property
    def kv_heads(self) -> int:
        """Key/value heads, derived where the config leaves them open."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_size(self) -> int:
        """Elements of one head, derived where the config leaves them open."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def attention_size(self) -> int:
        """Elements of all query heads: the inner width of attention."""
        return self.num_heads * self.head_size

    @property
    def has_qkv_bias(self) -> bool:
        """Whether query, key and value have a bias."""
        return self.bias if self.qkv_bias is None else self.qkv_bias

    @property
    def has_projection_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.bias if self.projection_bias is None else self.projection_bias

    @property
    def has_norm_bias(self) -> bool:
        """Whether norms have a bias: RMSNorm never has."""
        return self.norm == "layernorm" and (self.bias if self.norm_bias is None else self.norm_bias)

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
    """Training objective."""

    name: str = "clm"
    """``clm``: next-token prediction, on masked tokens only if the data have a loss mask. ``sft``: the same, for data
    that must have a loss mask (prompts and completions). ``mlm``: masked language modelling (Devlin et al. 2019)."""
    mask_probability: float = 0.15
    """``mlm``: fraction of tokens to predict; of these 80 % become the mask token, 10 % a random token, 10 % stay."""
    whole_words: bool = False
    """``mlm``: whole-word masking: all subword tokens of a word together."""
    z_loss: float = 0.0
    """Weight of the z-loss, the squared log-partition of the logits (Chowdhery et al. 2022: 1e-4). Reported losses do
    not include it."""


@dataclass(frozen=True, kw_only=True)
class Data:
    """Token shards and the order in which they are read."""

    path: tuple[str, ...]
    """One or more prepared datasets, as ``megalm prepare`` writes them: a folder with ``train/`` and ``val/``,
    the ``http(s)://`` address of one, or ``pipe:COMMAND``, which prints the file whose name replaces ``{file}``."""
    weights: tuple[float, ...] = ()
    """Relative sampling weights of the datasets; empty: in proportion to their sizes."""
    max_epochs: tuple[float, ...] = ()
    """Maximum epochs per dataset (0: unlimited); empty: no limits."""
    phase: int = 0
    """Increase it to change the data of a run deliberately: a resumed run with a higher phase than its checkpoint's
    reads the new data from the beginning. Within a phase, changed data are refused."""
    reset_at_documents: bool = False
    """Restrict attention to the token's own document and restart positions at each document."""
    cache_dir: str | None = None
    """Cache folder for shards that ``pipe:`` fetches; None: the system's temporary folder."""
    cache_gib: float = 50.0
    """Maximum size of the cache; the least recently used shards are deleted first."""
    block_sequences: int | None = None
    """Sequences per block, read contiguously; blocks are shuffled. 1 shuffles single sequences. None: as a resumed run
    began; in a run that begins on more than 64 ranks, if ``lanes`` and ``window_blocks`` are None too, as
    ``data=blocks`` (64, 4 and 32); else 1."""
    lanes: int | None = None
    """Number of streams of blocks; sample g is read from stream ``g mod lanes``. None: see ``block_sequences``."""
    window_blocks: int | None = None
    """Blocks whose sequences are shuffled together within a stream. None: see ``block_sequences``."""
    prefetch_batches: int = 2
    """Batches prefetched by a background thread."""
    readers: str = "every_rank"
    """Ranks that read shards: ``every_rank``, or ``one_per_replica``, which sends its batch to the other ranks that
    compute with the same rows (tp × pp) in one message per step; those open no file of the data."""


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW (Loshchilov & Hutter 2019), its learning-rate schedule, and clipping."""

    lr: float
    """Peak learning rate."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    epsilon: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norms and biases are not decayed."""
    clip_grad_norm: float = 1.0
    """Maximum global gradient norm; 0: no clipping."""
    schedule: str = "cosine"
    """``cosine``, ``linear``, ``constant`` or ``wsd`` (warm-up, stable, decay: Hu et al. 2024), after a linear
    warm-up."""
    warmup_tokens: int = 0
    """Tokens of linear warm-up."""
    decay_tokens: int | None = None
    """Tokens from the start of the run to the end of the decay; None: all tokens of the run."""
    cooldown_tokens: int | None = None
    """``wsd``: length of the decay phase, which ends at ``decay_tokens``; None: a tenth of the run."""
    cooldown: str = "linear"
    """``wsd``: shape of the decay, ``linear`` or ``sqrt`` (1 − √progress, Hägele et al. 2024)."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end of the decay, relative to the peak."""
    rewarm_tokens: int | None = None
    """Re-warm-up of a resumed run: tokens over which the rate rises from its current value to ``lr``; the decay is then
    planned to the end of the run. Applied once: a checkpoint whose config has the same value has begun it."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Numeric format and ZeRO stage (Rajbhandari et al. 2020)."""

    dtype: str = "bf16"
    """``fp32``, or ``bf16`` or ``fp16`` with fp32 masters and fp32 gradient accumulation."""
    zero_stage: int = 1
    """0: no partitioning (fp32); 1: optimizer state; 2: gradients too; 3: weights too."""
    offload_optimizer: bool = False
    """Keep masters and moments in host memory and update them there."""
    initial_loss_scale: float = 65536.0
    """``fp16``: first value of the dynamic loss scale (Micikevicius et al. 2018)."""
    loss_scale_window: int = 1000
    """``fp16``: steps without an overflow after which the loss scale doubles."""
    bucket_mib: float = 32.0
    """Minimum size of a gradient bucket, which is reduced while backward continues; above 128 replicas it grows with
    their number."""
    reduce_dtype: str = "fp32"
    """Format in which gradients travel between replicas: ``fp32``, or ``bf16``, which halves the bytes (ZeRO-1 and 2).
    With ``bf16`` replicas exchange pieces of their fp32 sums over micro-batches, each rounded once, and add them in
    fp32. Copies of tied embeddings and parts of tensor-parallel ranks are added in fp32 in any case."""
    gradient_accumulation_fusion: bool = False
    """The weight gradient's product of a linear layer adds to the fp32 gradient itself; no gradient in the model's
    format is written. On CUDA it needs compute capability 8.0; on a CPU it works, but is slow. With
    ``engine.compile=true`` a block is compiled in pieces between its linear layers."""
    recompute: str = "none"
    """Activation recomputation: ``none``, ``selective`` (the attention core) or ``full`` (whole blocks; Chen et al.
    2016, Korthikanti et al. 2022)."""
    recompute_every: int = 1
    """Recompute every k-th block of a stage; 1: all."""
    compile: bool | None = None
    """``torch.compile`` each block, and the loss. None: off; to be on for GPUs once ``tests/gpu`` has passed on one."""
    attention: str = "auto"
    """Kernels of attention with windows on GPUs, and of ``parallel.cp_attention=ring``: ``auto`` (with masks and scores
    in memory; to be ``fused`` on GPUs once ``tests/gpu`` has passed on one with it) or ``fused`` (flex attention's
    block masks, Dong et al. 2024; the flash kernel and its log-sum-exp in the ring, Dao et al. 2022)."""
    loss_chunk_tokens: int = 2048
    """Tokens per chunk of the cross-entropy, whose fp32 logits exist at one time; 0: the whole micro-batch."""

    @property
    def compiles(self) -> bool:
        """Whether blocks are compiled: the one place that says what null means, which no GPU has proven yet."""
        return bool(self.compile)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When to save, what to keep, and what to start from."""

    every: int = 1000
    """Steps between checkpoints; the last step is always saved. 0: off."""
    every_minutes: float = 0.0
    """Minutes between checkpoints, checked after each step; 0: off."""
    keep_last: int = 2
    """Number of newest checkpoints to keep; 0: all."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are never deleted; 0: off."""
    keep_best: int = 0
    """Number of checkpoints with the lowest validation loss to keep, among those saved at a validated step."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory: of one rank's share of masters and
    moments. False: training waits, and there is no copy."""
    on_failure: str = "continue"
    """What to do when a save fails because the disk is full or broken: ``continue`` training and try again at the next
    save, or ``stop`` with exit code 3. Any other failure stops the run, and so does a failure of the last checkpoint,
    unless the job will be requeued and an older checkpoint exists."""
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
    """W&B project."""
    wandb_entity: str | None = None
    """W&B entity (user or team); None: the default of the API key."""
    wandb_group: str | None = None
    """W&B group."""
    wandb_tags: tuple[str, ...] | None = None
    """W&B tags."""
    wandb_notes: str | None = None
    """W&B notes."""
    tensorboard: bool = True
    """Write TensorBoard event files to ``tensorboard/``."""
    every: int = 1
    """Steps between lines on a console that is not a terminal; ``metrics.jsonl`` has every step."""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The machine that a job is planned for; ``gpus`` is what ``megalm check`` validates a layout against."""

    name: str = "local"
    """Name of the machine, for messages."""
    gpus: int = 0
    """Total GPUs of the job; 0: as many as ranks are started."""
    gpus_per_node: int = 8
    """GPUs per node."""
    gpu: str | None = None
    """Key into ``hardware.yaml``; None: detected, and MFU is null when the device is unknown."""


@dataclass(frozen=True, kw_only=True)
class Train:
    """Length and batch of a run."""

    steps: int
    """Optimizer steps of the run."""
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
    late_metrics: bool = False
    """Look at a step's loss and norm when the next step has been started, so that a GPU never waits for the host. A
    stop and a divergence are then found one step later; what is saved and recorded is the same."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a finished run leaves besides its checkpoint: a loss curve and a sample."""

    plot: bool = True
    """Write ``loss.png`` into the run folder."""
    prompt: str | None = None
    """Text that the finished model continues; None: no sample."""
    max_new_tokens: int = 120
    """Maximum tokens of the sample."""
    temperature: float = 0.8
    """Sampling temperature; 0: greedy."""
    top_k: int = 40
    """Sample from this many most likely tokens; 0: all."""


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Tasks that a run is evaluated on while it trains: see [evaluation](evaluation.md)."""

    tasks: tuple[str, ...] | None = None
    """Tasks by name (``conf/task/``), or task files (``NAME.yaml``); None: none."""
    data: tuple[str, ...] | None = None
    """A data file for each task, in their order; None: those that the task files name."""
    every: int = 0
    """Steps between evaluations; 0: only at the end."""
    examples: int | None = None
    """Worked examples before each item; None: as each task says."""
    limit: int | None = None
    """Only the first items of each task, as many as this; None: as each task says."""


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
    evaluate: Evaluate = field(default_factory=Evaluate)
