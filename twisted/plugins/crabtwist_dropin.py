"""
What crabtwist adds to Twisted's plugins: the `twistd crabtwist` command and the built-in makers.

Everything here is a word and a dotted path; nothing is imported before somebody asks for it.
"""

from twisted.application.service import ServiceMaker

from crabtwist.plugins import ExtensionMaker, ProviderMaker, StorageMaker

crabtwist = ServiceMaker("crabtwist", "crabtwist.tap", "An LLM API gateway", "crabtwist")

anthropic = ProviderMaker("anthropic", "crabtwist.providers.anthropic:AnthropicProvider")
openai = ProviderMaker("openai", "crabtwist.providers.openai:OpenAIProvider")
echo = ProviderMaker("echo", "crabtwist.providers.echo:EchoProvider")

logging = ExtensionMaker("logging", "crabtwist.extensions.logging:LoggingExtension")

memory = StorageMaker("memory", "crabtwist.storage.memory:MemoryStorage")
