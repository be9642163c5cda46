variable "name" {
  type        = string
  description = "Begins the bucket's name, which ends with the account's number."
}

variable "prefix" {
  type        = string
  description = "Where in the bucket the tables are."
}

variable "keep_versions_days" {
  type        = number
  description = "Days that replaced and deleted objects can still be had back."
}
