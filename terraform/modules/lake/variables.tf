variable "name" {
  type        = string
  description = "Begins the bucket's name, which ends with the account's number."
}

variable "keep_versions_days" {
  type        = number
  description = "Days that replaced and deleted objects can still be had back."
}
