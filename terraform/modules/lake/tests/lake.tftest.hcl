mock_provider "aws" {
  source          = "../mocks"
  override_during = plan
}

variables {
  name               = "test"
  prefix             = "lake"
  keep_versions_days = 30
}

# A plan only: what is made could not be removed again, the bucket says.
run "lake" {
  command = plan
  assert {
    condition     = aws_s3_bucket_versioning.this.versioning_configuration[0].status == "Enabled"
    error_message = "versioned"
  }
  assert {
    condition     = one(one(aws_s3_bucket_server_side_encryption_configuration.this.rule).apply_server_side_encryption_by_default).sse_algorithm == "aws:kms"
    error_message = "encrypted with the lake's key"
  }
  assert {
    condition = (
      aws_s3_bucket_public_access_block.this.block_public_acls && aws_s3_bucket_public_access_block.this.block_public_policy &&
      aws_s3_bucket_public_access_block.this.ignore_public_acls && aws_s3_bucket_public_access_block.this.restrict_public_buckets
    )
    error_message = "never public"
  }
  assert {
    condition = (
      data.aws_iam_policy_document.bucket.statement[0].effect == "Deny" &&
      one(data.aws_iam_policy_document.bucket.statement[0].condition).variable == "aws:SecureTransport"
    )
    error_message = "nothing without TLS"
  }
  assert {
    condition     = aws_kms_key.this.enable_key_rotation
    error_message = "the key is rotated"
  }
  assert {
    condition     = output.uri == "s3a://test-lake-123456789012/lake"
    error_message = "a URI for the inventory, in a bucket that only this account can have"
  }
}
