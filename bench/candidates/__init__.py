"""The gateways that are measured, each with the configuration that it is measured with."""
