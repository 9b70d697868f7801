"""
What crabtwist adds to Twisted's plugins: the `twistd crabtwist` command and the built-in makers.

Everything here is a word and a dotted path; nothing is imported before somebody asks for it.
"""

from twisted.application.service import ServiceMaker

from crabtwist.plugins import ExtensionMaker, LedgerMaker, ProviderMaker, StorageMaker

crabtwist = ServiceMaker("crabtwist", "crabtwist.tap", "An LLM API gateway", "crabtwist")

anthropic = ProviderMaker("anthropic", "crabtwist.providers.anthropic:AnthropicProvider")
openai = ProviderMaker("openai", "crabtwist.providers.openai:OpenAIProvider")
echo = ProviderMaker("echo", "crabtwist.providers.echo:EchoProvider")

budget = ExtensionMaker("budget", "crabtwist.extensions.budget:BudgetExtension")
rate_limit = ExtensionMaker("rate_limit", "crabtwist.extensions.rate_limit:RateLimitExtension")
cache = ExtensionMaker("cache", "crabtwist.extensions.cache:CacheExtension")
logging = ExtensionMaker("logging", "crabtwist.extensions.logging:LoggingExtension")
usage = ExtensionMaker("usage", "crabtwist.extensions.usage:UsageExtension")
audit = ExtensionMaker("audit", "crabtwist.extensions.audit:audit")

sqlite_ledger = LedgerMaker("sqlite", "crabtwist.ledger.sqlite:SQLiteLedger")
postgres_ledger = LedgerMaker("postgres", "crabtwist.ledger.postgres:PostgresLedger")

memory = StorageMaker("memory", "crabtwist.storage.memory:MemoryStorage")
sqlite = StorageMaker("sqlite", "crabtwist.storage.sqlite:SQLiteStorage")
redis = StorageMaker("redis", "crabtwist.storage.redis:RedisStorage")
postgres = StorageMaker("postgres", "crabtwist.storage.postgres:PostgresStorage")
