"""GraphQL: W&B's schema as far as it is built, over the store. An operation that is not built is absent from the schema."""
