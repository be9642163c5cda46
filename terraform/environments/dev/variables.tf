# What is yours and not the environment's: give it in terraform.tfvars, which git ignores, or as TF_VAR_<name>.

variable "admin_cidrs" {
  type        = list(string)
  description = "Networks that may reach the bastion's SSH, for example [\"203.0.113.7/32\"]."
}

variable "admin_public_key" {
  type        = string
  description = "Your public SSH key, the line of ~/.ssh/id_ed25519.pub."
}

variable "ami_id" {
  type        = string
  description = "Image of new machines; without it the newest Debian 13."
  default     = null
}
