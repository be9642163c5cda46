output "bucket" {
  description = "The bucket's name."
  value       = aws_s3_bucket.this.bucket
}

output "bucket_arn" {
  description = "The bucket, for policies."
  value       = aws_s3_bucket.this.arn
}

output "key_arn" {
  description = "The key that encrypts it, for policies."
  value       = aws_kms_key.this.arn
}

output "uri" {
  description = "lake_uri of the inventory."
  value       = "s3a://${aws_s3_bucket.this.bucket}/${var.prefix}"
}

output "events_uri" {
  description = "spark_event_log_dir of the inventory."
  value       = "s3a://${aws_s3_object.events.bucket}/spark-events"
}
